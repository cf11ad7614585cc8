"""How two machines that do not know each other become peers: by a short code, or by a token that was printed before.

messages    what is sent: few bytes, of one shape
exchange    who proves what when: SPAKE2, bound to both certificates; no sockets
secrets     what may be proven just now: how long, how often, how fast
tokens      what ``coordinator invite`` prints
listener    the node's end: open only while there is something to prove
desk        when the node's end opens and closes, and what people are told
"""
