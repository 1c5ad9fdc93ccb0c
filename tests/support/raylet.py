"""A node that joins a cluster on this machine. `ray start --address` refuses a second node on loopback, so it is not used."""

import json
import sys
import threading

from ray._private.node import Node
from ray._private.parameter import RayParams

if __name__ == "__main__":
    address, num_cpus, labels = sys.argv[1:]
    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=float(num_cpus),
        labels=json.loads(labels),
        object_store_memory=100 << 20,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        include_dashboard=False,
    )
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    threading.Event().wait()
