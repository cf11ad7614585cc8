"""Steps of fleets that nobody has yet: events in simulated time. Pure: no I/O, no clock, no MLX.

Who takes part, in which order, with which rows is decided by the code that decides it for real fleets (``planner``,
``division``, ``pace``, ``shares``). What is simulated is the rest: computing, with its noise; the packets of the sum,
from neighbour to neighbour; who waits for whom; who slows down or is lost.
"""
