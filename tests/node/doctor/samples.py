"""What macOS prints, for the doctor to read.

None of it was recorded on a Mac by us: it was written after Apple's manual pages, and after outputs that others have
published. Where a real Mac prints something else, its output belongs here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from node.doctor.readings import FIREWALL

SW_VERS = "26.2"
# After pmset(1). Two lines begin with Sleep; the reasons are those that hold for the moment.
PMSET = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                15 (sleep prevented by powerd, caffeinate)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 lowpowermode         0
 womp                 1
"""
PMSET_DISABLED = f"System-wide power settings:\n SleepDisabled\t\t1\n{PMSET.partition(chr(10))[2]}"
BATTERY = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining present: true"
FIREWALL_ON = "Firewall is enabled. (State = 1)"
FIREWALL_OFF = "Firewall is disabled. (State = 0)"
FIREWALL_ALL = "Firewall is enabled. (State = 2)"
BLOCK_ALL_OFF = "Block all DISABLED!"
BLOCK_ALL_ON = "Firewall is set to block all non-essential incoming connections"
APP_PERMITTED = "Incoming connection to the application is permitted"
APP_BLOCKED = "Incoming connection to the application is blocked"


def thunderbolt(speed: str = "Up to 120 Gb/s", mac: str = "", device: str = "", ports: int = 3) -> str:
    """``system_profiler SPThunderboltDataType -json`` of a Mac with so many ports."""
    buses = []
    for number in range(ports):
        taken = number == 0 and (mac or device)
        items: list[dict[str, object]] = []
        if number == 0 and mac:
            items.append({"_name": mac, "device_name_key": "Mac15,14", "domain_uuid_key": "28CA4C30-0000"})
        if number == 0 and device:
            items.append({"_name": device, "device_name_key": device, "switch_uid_key": "0x8087"})
        buses.append(
            {
                **({"_items": items} if items else {}),
                "_name": f"thunderboltusb4_bus_{number}",
                "device_name_key": "Mac Studio",
                "domain_uuid_key": f"0000-{number}",
                "receptacle_1_tag": {
                    "current_speed_key": "80 Gb/s" if taken and "120" in speed else speed,
                    "receptacle_id_key": str(number + 1),
                    "receptacle_status_key": f"receptacle_{'connected' if taken else 'no_devices_connected'}",
                },
            }
        )
    return json.dumps({"SPThunderboltDataType": buses})


IFCONFIG = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 1c:f6:4c:00:00:01
\tinet 192.168.1.5 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect (10Gbase-T <full-duplex,flow-control>)
\tstatus: active
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 36:1c:f6:00:00:02
\tConfiguration:
\t\tid 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
\tmember: en2 flags=3<LEARNING,DISCOVER>
\tmember: en3 flags=3<LEARNING,DISCOVER>
\tmedia: <unknown type>
\tstatus: inactive
"""
IFCONFIG_EN0 = "".join(line for line in IFCONFIG.splitlines(True)[2:7])
IFCONFIG_WIFI = "en1: flags=8863<UP> mtu 1500\n\tmedia: autoselect\n\tstatus: active\n"
IBV_DEVINFO = """hca_id:\trdma_en2
\ttransport:\t\t\tThunderbolt (5)
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_DOWN (1)
hca_id:\trdma_en3
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_ACTIVE (4)
"""
ROUTE = """   route to: default
destination: default
       mask: default
    gateway: 192.168.1.1
  interface: en0
      flags: <UP,GATEWAY,DONE,STATIC,PRCLONING,GLOBAL>
"""
LSOF = "p812\ncPython\nf12\n"

MAC: Mapping[str, str] = {
    "sw_vers -productVersion": SW_VERS,
    "sysctl -n sysctl.proc_translated": "0",
    "sysctl -n iogpu.wired_limit_mb": "0",
    f"{FIREWALL} --getglobalstate": FIREWALL_ON,
    f"{FIREWALL} --getblockall": BLOCK_ALL_OFF,
    f"{FIREWALL} --getappblocked /usr/bin/python3": APP_PERMITTED,
    "pmset -g": PMSET,
    "pmset -g batt": BATTERY,
    "system_profiler SPThunderboltDataType -json": thunderbolt(mac="Air", device="Envoy Ultra"),
    "ifconfig -a": IFCONFIG,
    "ifconfig en0": IFCONFIG_EN0,
    "ifconfig en1": IFCONFIG_WIFI,
    "rdma_ctl status": "enabled",
    "ibv_devinfo": IBV_DEVINFO,
    "route -n get default": ROUTE,
}
"""A Mac on which all is well, by command."""


def says(outputs: Mapping[str, str]) -> Callable[[Sequence[str]], str | None]:
    """Answers commands as ``hardware.run_text`` does."""
    return lambda arguments: outputs.get(" ".join(arguments), "").strip() or None
