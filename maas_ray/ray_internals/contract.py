"""All private names of Ray that maas-ray uses, with their signatures in one version; finds changes of other versions.

`check` imports each name and compares signatures and fields. It needs no cluster, but imports ray.serve and ray.train,
which keep values of the environment: `python -m maas_ray.ray_internals.contract` runs it in a separate process and
prints the changes as JSON. It cannot detect changed behavior under the same name.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from maas_ray.ray_internals.symbol import Broken, Symbol, call, holds, problem_of, public, there

READ_IN = "2.60.0"
"""The version of Ray from which the signatures were taken."""


_KV = "ray.experimental.internal_kv"
_RAYLET = "ray._raylet"
_STATE = "ray._private.state"
_EXECUTION = "ray.train.v2._internal.execution"
_GROUP = f"{_EXECUTION}.worker_group"
_CALLBACKS = "ray.train.v2._internal.callbacks"
_FAILURES = "ray.train.v2._internal.exceptions"
_SCALING = f"{_EXECUTION}.scaling_policy"
_SERVE = "ray.serve._private"
_SCHEDULER = f"{_SERVE}.deployment_scheduler"

_SHARED = "claims, notes, limits and records of pools on the head node"
_HEAD = "requests to a head node with a timeout"
_LIMITS = "preflight with an autoscaler"
_RANKS = "starting and watching the workers of a run"
_SIZES = "the number of workers of a run, and its changes"
_ROLL = "the ranks of a run and their state"
_CONTROLLER = "reading the deployed applications from Serve's controller"
_PORTS = "no port of Serve that is open to everyone"
_PROXY = "limits and sleeping pools in Serve's proxy"
_PLACE = "placing replicas of pools on nodes"
_MOVE = "moving replicas of pools to recovered nodes"

CONTRACT: tuple[Symbol, ...] = (
    # kv.py
    call(_KV, "_internal_kv_put", "key value overwrite namespace", _SHARED),
    call(_KV, "_internal_kv_get", "key namespace", _SHARED),
    call(_KV, "_internal_kv_del", "key del_by_prefix namespace", _SHARED),
    call(_KV, "_internal_kv_list", "prefix namespace", _SHARED),
    # gcs.py
    there(_RAYLET, "GcsClient", _HEAD),
    call(_RAYLET, "InnerGcsClient.internal_kv_get", "self key namespace timeout", _HEAD),
    call(_RAYLET, "InnerGcsClient.internal_kv_put", "self key value overwrite namespace timeout", _HEAD),
    call(_RAYLET, "InnerGcsClient.get_all_node_info", "self timeout node_selectors state_filter", _HEAD),
    call(
        _RAYLET,
        "InnerGcsClient.drain_node",
        "self node_id reason reason_message deadline_timestamp_ms timeout",
        "draining the node of a leaving machine",
    ),
    there("ray.core.generated.gcs_pb2", "GcsNodeInfo.ALIVE", "listing live nodes", kind=int, value=0),
    there(
        "ray.core.generated.autoscaler_pb2",
        "DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION",
        "draining the node of a leaving machine",
        kind=int,
    ),
    # nodes.py
    call(_STATE, "available_resources_per_node", "", "free resources of each node"),
    call(_STATE, "state.get_draining_nodes", "", "draining nodes"),
    call(_STATE, "state.get_cluster_config", "", _LIMITS),
    call(_RAYLET, "node_labels_match_selector", "node_labels selector", "placement by labels"),
    there(_RAYLET, "GCS_AUTOSCALER_CLUSTER_CONFIG_KEY", _LIMITS, kind=str),
    there(_RAYLET, "GCS_AUTOSCALER_STATE_NAMESPACE", _LIMITS, kind=str),
    there("ray.core.generated.autoscaler_pb2", "ClusterConfig", _LIMITS),
    # driver.py and processes.py
    public("ray.job_config", "JobConfig", "_py_driver_sys_path", "import paths of workers"),
    there(f"{_SERVE}.constants", "RAY_SERVE_ENABLE_HA_PROXY", "refusing a driver of another profile", kind=bool),
    there(f"{_SERVE}.constants", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "refusing a driver of another profile", kind=bool),
    there("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", "a cluster on loopback", kind=bool),
    call(_RAYLET, "Config.initialize", "config_list", "joining with a token after the import of Ray"),
    call(_RAYLET, "AuthenticationTokenLoader.instance", "", "joining with a token after the import of Ray"),
    call(_RAYLET, "AuthenticationTokenLoader.reset_cache", "self", "joining with a token after the import of Ray"),
    call("ray._private.worker", "get_dashboard_url", "", "checking the fronts in doctor"),
    there("ray._common.utils", "psutil", "ending the processes of a cluster"),
    # data.py
    there("ray.data._internal.progress", "logger", "suppressing Ray Data's lines per execution"),
    # train.py: removed parts, and causes of failed attempts
    there(_CALLBACKS, "BackendSetupCallback", _RANKS),
    there(_CALLBACKS, "DatasetsCallback", _RANKS),
    there(f"{_CALLBACKS}.placement_group_callback", "PlacementGroupCleanerCallback", _RANKS),
    there(f"{_CALLBACKS}.preemption_callback", "PreemptionCallback", _RANKS),
    there(_FAILURES, "WorkerGroupStartupFailedError", "restarting a run"),
    there(_FAILURES, "WorkerGroupStartupTimeoutError", "restarting a run"),
    public("ray.train.v2.api.exceptions", "ControllerError", "controller_failure", "restarting a run"),
    public(
        "ray.train.v2.api.exceptions", "WorkerGroupError", "error_message worker_failures", "finding the failed rank"
    ),
    # train.py: the trainer and its controller
    call("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer._create_default_callbacks", "self", _RANKS),
    call(
        "ray.train.v2.api.data_parallel_trainer",
        "DataParallelTrainer._initialize_and_run_controller",
        "self controller_init_kwargs",
        _RANKS,
    ),
    call(
        f"{_EXECUTION}.controller",
        "TrainController",
        "train_fn_ref train_run_context scaling_policy failure_policy callbacks validation_config",
        _RANKS,
    ),
    holds(
        f"{_EXECUTION}.controller",
        "TrainController",
        "worker_group_cls _state _worker_group_callbacks_to_propagate",
        _RANKS,
    ),
    call(f"{_EXECUTION}.controller", "TrainController.run", "self", _RANKS),
    call(f"{_EXECUTION}.controller", "TrainController.get_result", "self", _RANKS),
    call(f"{_EXECUTION}.controller", "TrainController.get_worker_group", "self", _RANKS),
    call(
        f"{_EXECUTION}.controller",
        "TrainController._start_worker_group",
        "self num_workers resources_per_worker",
        _SIZES,
    ),
    call(f"{_EXECUTION}.controller", "TrainController._execute_resize_decision", "self decision", _SIZES),
    call(f"{_EXECUTION}.controller", "TrainController._shutdown_worker_group", "self", _SIZES),
    call(f"{_EXECUTION}.controller", "TrainController._get_run_attempt_id", "self", _SIZES),
    call(f"{_EXECUTION}.controller", "TrainController._poll_workers", "self", _ROLL),
    call(f"{_EXECUTION}.controller", "TrainController._is_training_succeeded", "worker_group_status", _ROLL),
    call(
        f"{_EXECUTION}.controller.controller",
        "TrainControllerLoopIterationResult",
        "run_attempt_id previous_state next_state training_failed_error",
        _SIZES,
    ),
    call(f"{_EXECUTION}.controller.state", "InitializingState", "", _SIZES),
    # train.py: policies
    call(f"{_EXECUTION}.failure_handling", "FailurePolicy", "failure_config", "restarting a run"),
    call(
        f"{_EXECUTION}.failure_handling",
        "FailurePolicy.make_decision",
        "self training_failed_error",
        "restarting a run",
    ),
    there(f"{_EXECUTION}.failure_handling", "FailureDecision.RETRY", "restarting a run"),
    there(f"{_EXECUTION}.failure_handling", "FailureDecision.RAISE", "restarting a run"),
    call(_SCALING, "ScalingPolicy", "scaling_config", _SIZES),
    call(_SCALING, "ScalingPolicy._get_num_workers_for_resource_request", "self", _SIZES),
    call(_SCALING, "ScalingPolicy._send_resource_request", "self", _SIZES),
    call(_SCALING, "ScalingPolicy._maybe_send_resource_request", "self", _SIZES),
    call(_SCALING, "ScalingPolicy._cancel_resource_request", "self", _SIZES),
    call(_SCALING, "ScalingPolicy.make_decision_for_non_running_worker_group", "self", _SIZES),
    call(
        _SCALING,
        "ScalingPolicy.make_decision_for_running_worker_group",
        "self worker_group_state worker_group_status",
        _SIZES,
    ),
    there(_SCALING, "ScalingDecision", _SIZES),
    call(_SCALING, "NoopDecision", "", _SIZES),
    call(_SCALING, "ResizeDecision", "num_workers resources_per_worker", _SIZES),
    # train.py: the group of workers
    call(
        f"{_EXECUTION}.callback",
        "WorkerGroupCallback.after_worker_group_start",
        "self worker_group",
        "creating the process group of the ranks",
    ),
    call(
        f"{_EXECUTION}.callback",
        "WorkerGroupCallback.before_worker_group_shutdown",
        "self worker_group",
        "destroying the process group",
    ),
    call(_GROUP, "WorkerGroup", "train_run_context worker_group_context callbacks", _RANKS),
    holds(_GROUP, "WorkerGroup", "_callbacks _worker_group_start_timeout_s _worker_group_state", _RANKS),
    call(_GROUP, "WorkerGroup._start", "self", _RANKS),
    call(_GROUP, "WorkerGroup.has_started", "self", _RANKS),
    call(_GROUP, "WorkerGroup._clear_state", "self", _RANKS),
    call(_GROUP, "WorkerGroup._get_worker_runtime_env", "custom_runtime_env", _RANKS),
    call(_GROUP, "WorkerGroup._create_placement_group", "self scaling_config worker_group_context", _RANKS),
    call(
        _GROUP,
        "WorkerGroup._create_workers",
        "self num_workers placement_group resources_per_worker placement_group_bundle_indices starting_world_rank "
        "world_size replica_group_size",
        _RANKS,
    ),
    call(_GROUP, "WorkerGroup._init_train_context_on_workers", "self workers sync_actor train_context_args", _RANKS),
    call(_GROUP, "WorkerGroup.get_workers", "self", _ROLL),
    call(_GROUP, "WorkerGroup.execute_async", "self fn fn_args fn_kwargs", _RANKS),
    call(_GROUP, "WorkerGroup.execute_single_async", "self rank fn fn_args fn_kwargs", _RANKS),
    call(_GROUP, "WorkerGroup.abort", "self", _RANKS),
    call(_GROUP, "WorkerGroup.__len__", "self", _RANKS),
    call(f"{_GROUP}.state", "WorkerGroupState.shutdown", "self", _RANKS),
    holds(f"{_GROUP}.state", "WorkerGroupState", "workers", _RANKS),
    call(f"{_GROUP}.state", "_shutdown_sync_actor", "sync_actor", "no actor for an unused barrier"),
    there(f"{_GROUP}.worker_group", "SynchronizationActor", "no actor for an unused barrier"),
    holds(f"{_GROUP}.state", "WorkerGroupContext", "num_workers resources_per_worker placement_strategy", _RANKS),
    holds(f"{_GROUP}.poll", "WorkerGroupPollStatus", "worker_statuses", _ROLL),
    holds(f"{_GROUP}.poll", "WorkerStatus", "running error", _ROLL),
    holds(f"{_GROUP}.worker", "Worker", "metadata distributed_context", _ROLL),
    holds(f"{_GROUP}.worker", "ActorMetadata", "node_id node_ip pid", _ROLL),
    holds(f"{_EXECUTION}.context", "DistributedContext", "local_rank local_world_size node_rank", _ROLL),
    call(f"{_GROUP}.placement_group_handle", "DefaultPlacementGroupHandle", "pg", _RANKS),
    call(f"{_GROUP}.placement_group_handle", "DefaultPlacementGroupHandle.shutdown", "self", _RANKS),
    # serve.py
    call("ray.serve.context", "_get_global_client", "raise_if_no_controller_running", _CONTROLLER),
    call("ray.serve.context", "_disconnect", "", "looking up a restarted controller"),
    holds(f"{_SERVE}.client", "ServeControllerClient", "_controller http_config", _CONTROLLER),
    call(f"{_SERVE}.client", "ServeControllerClient.get_serve_details", "self", _CONTROLLER),
    call(f"{_SERVE}.controller", "ServeController.get_grpc_config", "self", _CONTROLLER),
    call(f"{_SERVE}.controller", "ServeController.get_deployment_info", "self name app_name", _CONTROLLER),
    there(f"{_SERVE}.constants", "SERVE_CONTROLLER_NAME", _PROXY, kind=str),
    there(f"{_SERVE}.constants", "SERVE_NAMESPACE", _PROXY, kind=str),
    there(f"{_SERVE}.constants", "SERVE_LOGGER_NAME", "suppressing Serve's INFO lines in a terminal", kind=str),
    call(f"{_SERVE}.deployment_info", "DeploymentInfo.from_proto", "proto", _CONTROLLER),
    holds(f"{_SERVE}.deployment_info", "DeploymentInfo", "replica_config version", _CONTROLLER),
    holds(f"{_SERVE}.config", "ReplicaConfig", "init_args", _CONTROLLER),
    there("ray.serve.generated.serve_pb2", "DeploymentRoute.FromString", _CONTROLLER),
    public("ray.serve", "Deployment.options", "version _internal", "keeping the replicas of unchanged pools"),
    public("ray.serve", "delete", "_blocking", "removing several pools at once"),
    call(
        "ray.serve.handle",
        "DeploymentBroadcastResponse._fetch_replica_results_async",
        "self",
        "metrics of a pool with a silent replica",
    ),
    holds("ray.serve.handle", "DeploymentHandle", "_router", _PROXY),
    call("ray.serve.handle", "DeploymentHandle.running_replicas_populated", "self", "gRPC calls without a pool"),
    holds(f"{_SERVE}.router", "SingletonThreadRouter", "_asyncio_router", _PROXY),
    holds(f"{_SERVE}.router", "CurrentLoopRouter", "_asyncio_router", _PROXY),
    holds(f"{_SERVE}.router", "AsyncioRouter", "_request_router _running_replicas", _PROXY),
    holds(f"{_SERVE}.request_router.request_router", "RequestRouter", "curr_replicas", _PROXY),
    # serve_servers.py and http_server.py
    there(f"{_SERVE}.constants", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "our HTTP server in Serve's processes"),
    there(f"{_SERVE}.constants", "DEFAULT_GRPC_SERVER_OPTIONS", "the limit of a gRPC message", kind=list),
    call(f"{_SERVE}.replica", "add_port_to_grpc_server", "server address", _PORTS),
    call(f"{_SERVE}.default_impl", "add_grpc_address", "grpc_server server_address", _PORTS),
    call(
        f"{_SERVE}.grpc_util",
        "gRPCGenericServer.add_passthrough_service",
        "self service_name",
        "gRPC methods without Serve's wrapper",
    ),
    call(
        f"{_SERVE}.proxy_router",
        "ProxyRouter.get_handle_for_endpoint",
        "self target_app_name",
        "gRPC calls without a pool",
    ),
    call(f"{_SERVE}.proxy_router", "ProxyRouter.match_route", "self target_route", _PROXY),
    call(f"{_SERVE}.proxy_router", "ProxyRouter.ready_for_traffic", "self is_head", _PROXY),
    holds(f"{_SERVE}.proxy_router", "ProxyRouter", "handles route_info", _PROXY),
    holds(f"{_SERVE}.proxy", "HTTPProxy", "proxy_router", _PROXY),
    holds(f"{_SERVE}.http_util", "RequestIdMiddleware", "_app", "finding Serve's app inside its middlewares"),
    holds(f"{_SERVE}.replica", "Replica", "_route_prefix", "the base path of a pool"),
    there(f"{_SERVE}.http_util", "uvicorn.Server", "servers on the node's address only"),
    call("uvicorn", "Server.serve", "self sockets", "servers on the node's address only"),
    there("uvicorn.config", "HTTP_PROTOCOLS", "our protocol class in Serve's processes", kind=dict),
    call(
        "uvicorn.protocols.http.httptools_impl",
        "HttpToolsProtocol",
        "config server_state app_state _loop",
        "our protocol class in Serve's processes",
    ),
    # serve_controller.py
    there(f"{_SERVE}.constants", "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH", "our parts in Serve's controller"),
    there(f"{_SERVE}.default_impl", "DeploymentScheduler", _PLACE, kind=type),
    there(f"{_SERVE}.controller", "DeploymentStateManager", "the nodes with a front", kind=type),
    call(_SCHEDULER, "DeploymentScheduler", "cluster_node_info_cache head_node_id create_placement_group_fn", _PLACE),
    holds(
        _SCHEDULER,
        "DeploymentScheduler",
        "_deployments _pending_replicas _launching_replicas _recovering_replicas _running_replicas "
        "_cluster_node_info_cache _head_node_id",
        _PLACE,
    ),
    call(
        _SCHEDULER,
        "DeploymentScheduler.on_deployment_deployed",
        "self deployment_id replica_config is_gang pins_replicas",
        _PLACE,
    ),
    call(_SCHEDULER, "DeploymentScheduler.on_deployment_deleted", "self deployment_id", _PLACE),
    call(_SCHEDULER, "DeploymentScheduler._get_available_resources_per_node", "self", _PLACE),
    call(_SCHEDULER, "DeploymentScheduler._schedule_with_spread_strategy", "self", _PLACE),
    call(
        _SCHEDULER,
        "DeploymentScheduler._schedule_replica",
        "self scheduling_request default_scheduling_strategy target_node_id target_labels",
        _PLACE,
    ),
    call(
        _SCHEDULER,
        "DeploymentScheduler._find_best_fit_node_for_pack",
        "self required_resources available_resources_per_node node_to_assigned_replicas required_labels_list "
        "node_labels",
        _PLACE,
    ),
    call(
        _SCHEDULER,
        "DeploymentScheduler._get_replicas_to_stop",
        "self deployment_id max_num_to_stop gang_id_by_replica replicas_by_gang_id gang_size",
        _PLACE,
    ),
    call(_SCHEDULER, "Resources.can_fit", "self other", _PLACE),
    call(_SCHEDULER, "Resources.__sub__", "self other", _PLACE),
    holds(_SCHEDULER, "ReplicaSchedulingRequest", "requested_resources", _PLACE),
    holds(_SCHEDULER, "DeploymentSchedulingInfo", "required_resources label_selector", _PLACE),
    holds(_SCHEDULER, "LaunchingReplicaInfo", "target_node_id", _PLACE),
    call(f"{_SERVE}.cluster_node_info_cache", "ClusterNodeInfoCache.get_active_node_ids", "self", _PLACE),
    call(f"{_SERVE}.cluster_node_info_cache", "ClusterNodeInfoCache.get_alive_node_ids", "self", _PLACE),
    call(f"{_SERVE}.cluster_node_info_cache", "ClusterNodeInfoCache.get_node_labels", "self node_id", _PLACE),
    call(
        f"{_SERVE}.deployment_state",
        "DeploymentState",
        "id long_poll_host deployment_scheduler cluster_node_info_cache autoscaling_state_manager",
        _MOVE,
    ),
    holds(f"{_SERVE}.deployment_state", "DeploymentState", "_id _target_state _deployment_scheduler", _MOVE),
    call(
        f"{_SERVE}.deployment_state",
        "DeploymentState.scale_deployment_replicas",
        "self gang_placement_groups proxy_nodes",
        _MOVE,
    ),
    call(f"{_SERVE}.deployment_state", "DeploymentState._get_target_replica_delta", "self", _MOVE),
    call(f"{_SERVE}.deployment_state", "DeploymentState.get_num_running_replicas", "self version", _MOVE),
    holds(f"{_SERVE}.deployment_state", "DeploymentTargetState", "version target_num_replicas deleting", _MOVE),
    call(f"{_SERVE}.deployment_state", "DeploymentStateManager.get_active_node_ids", "self", "the nodes with a front"),
    holds(f"{_SERVE}.deployment_state", "DeploymentStateManager", "_cluster_node_info_cache", "the nodes with a front"),
)
"""All private names, grouped by the file of this package that uses them."""


def check(symbols: Iterable[Symbol] = CONTRACT) -> list[Broken]:
    """Returns the changed names; empty if none. Imports ray.serve, ray.train and ray.data into this process."""
    return [
        Broken(symbol.name, problem, symbol.why) for symbol in symbols for problem in [problem_of(symbol)] if problem
    ]


if __name__ == "__main__":
    json.dump([asdict(broken) for broken in check()], sys.stdout)
