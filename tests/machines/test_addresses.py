"""Pools answer through the front of every node, and nothing behind the fronts answers anybody else."""

import json

import grpc
import pytest

from maas_ray.serve.grpc import inference_pb2 as pb
from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.ray_cluster import on_head
from tests.support.hosts.served import ask, publish, serve, write_spec
from tests.support.root import ROOT

PLANTED = ROOT / "tests" / "support" / "hosts" / "planted"
GRPC_PORT = 9000
FORGED = {"x-maas-front": "0" * 64}


@pytest.fixture(scope="module")
def served(machines: Network) -> Network:
    """One replica, so that the fronts of two nodes have none beside them."""
    serve(machines, write_spec(machines, grpc={"port": GRPC_PORT}))
    return machines


def test_a_front_that_only_its_own_machine_reaches_is_refused(machines: Network):
    spec = write_spec(machines, host="127.0.0.1", name="loopback.yaml")
    said = on_head(machines, f"maas-ray serve {spec} 2>&1", check=False)
    assert "are configured to listen on 127.0.0.1" in said
    assert "use 0.0.0.0 as the host" in said


def test_the_front_of_every_node_answers_wherever_the_replica_is(served: Network):
    for host in served.hosts:
        answer = ask(host)
        assert answer.status_code == 200, (host.name, answer.text)
        assert answer.json()["outputs"][0]["data"] == [2.0, 4.0, 6.0]


def test_grpc_is_answered_through_the_front_of_every_node(served: Network):
    for host in served.hosts:
        assert _model_ready(f"{host.address}:{GRPC_PORT}")


def test_no_port_behind_the_fronts_listens_beyond_the_nodes_own_address_or_answers_others(served: Network):
    """Those of Serve; Ray's own ports ask for the cluster's token themselves."""
    found = 0
    for host in served.hosts:
        for address, port in _listening(host, "ray::"):
            if address in ("127.0.0.1", "::1") or not (20_000 <= port < 32_000 or port in (8500, 9500)):
                continue
            assert address == host.address, f"{host.name}: {address}:{port}"
            if 20_000 <= port < 26_000 or port == 8500:
                for headers in ({}, FORGED):
                    refused = ask(host, port=port, headers=headers)
                    assert refused.status_code == 403, (host.name, port, refused.text)
                    assert "send the request to the front" in refused.json()["error"]
                assert ask(host, "/v2", None, port=port).status_code == 403
                assert ask(host, "/-/routes", None, port=port).status_code == 403
                assert ask(host, "/-/healthz", None, port=port).status_code == 200
                found += 1
            elif 26_000 <= port < 32_000:
                for metadata in ((), tuple(FORGED.items())):
                    with pytest.raises(grpc.RpcError) as refusal:
                        _model_ready(f"{host.address}:{port}", metadata)
                    assert refusal.value.code() == grpc.StatusCode.PERMISSION_DENIED
                found += 1
    assert found >= 3  # a replica's two, and Serve's own proxy on the head


def test_a_caller_cannot_forge_the_front_through_the_front(served: Network):
    """What a caller sends under the header's name is replaced, so the real one stays unknown and valid."""
    assert ask(served.hosts[1], headers=FORGED).status_code == 200


def test_status_and_doctor_check_the_front_of_every_node(served: Network):
    document = json.loads(on_head(served, "maas-ray doctor --json", check=False).strip().splitlines()[-1])
    found = {check["name"]: check for check in document["checks"]}
    assert found["fronts"]["ok"], found["fronts"]
    for host in served.hosts:
        assert host.address in found["fronts"]["detail"]


def test_a_front_that_reaches_only_the_replicas_of_its_own_node_is_named():
    """The planted fault: replicas and Serve's proxy listen on loopback, as they did by Serve's option."""
    with Network(3, {"PYTHONPATH": f"{PLANTED}:{ROOT}"}) as network:
        publish(network)
        ray_cluster.start(network, num_cpus=3, env={"MAAS_RAY_PLANTED": "loopback"})
        said = on_head(network, f"maas-ray serve {write_spec(network)} --timeout-s 30 2>&1", check=False, timeout_s=300)
        # The head's front finds Serve's own proxy on its node, and the front on the replica's node finds that replica.
        lonely = next(host for host in network.hosts[1:] if not host.pids("ray::ServeReplica"))
        assert f"http://{lonely.address}:8000/v2/health/ready answers 503" in " ".join(said.split())
        assert all(f"http://{host.address}" not in said for host in network.hosts if host is not lonely)
        document = json.loads(on_head(network, "maas-ray doctor --json", check=False).strip().splitlines()[-1])
        fronts = next(check for check in document["checks"] if check["name"] == "fronts")
        assert not fronts["ok"]
        assert lonely.address in fronts["detail"]


def _model_ready(address: str, metadata: tuple[tuple[str, str], ...] = ()) -> bool:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelReady",
            request_serializer=pb.ModelReadyRequest.SerializeToString,
            response_deserializer=pb.ModelReadyResponse.FromString,
        )
        return bool(call(pb.ModelReadyRequest(name="linear"), timeout=10, metadata=metadata).ready)


def _listening(host, command: str) -> list[tuple[str, int]]:
    """Addresses and ports of a host's listening processes whose name begins so."""
    found = []
    for line in host.run("ss -Hltnp").stdout.splitlines():
        fields = line.split()
        if f'(("{command}' in line:
            address, _, port = fields[3].rpartition(":")
            found.append((address.strip("[]").removeprefix("::ffff:"), int(port)))
    return found
