"""Starts, joins, checks and stops a Ray cluster on this machine, with the environment that maas-ray needs."""

from maas_ray.cluster.capacity.preflight import preflight, wait_for_nodes
from maas_ray.cluster.check import Check
from maas_ray.cluster.connection import connect, disconnect
from maas_ray.cluster.health.doctor import doctor
from maas_ray.cluster.health.front import front_url
from maas_ray.cluster.health.status import ClusterStatus, status
from maas_ray.cluster.members.head import down, up
from maas_ray.cluster.members.join import join
from maas_ray.cluster.node.environment import PROFILES, Ports, Profile, choose_ports, environment
from maas_ray.cluster.node.state import ClusterState, load_state
from maas_ray.process.home import state_directory

__all__ = [
    "PROFILES",
    "Check",
    "ClusterState",
    "ClusterStatus",
    "Ports",
    "Profile",
    "choose_ports",
    "connect",
    "disconnect",
    "doctor",
    "down",
    "environment",
    "front_url",
    "join",
    "load_state",
    "preflight",
    "state_directory",
    "status",
    "up",
    "wait_for_nodes",
]
