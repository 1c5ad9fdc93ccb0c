"""Where Ray Train keeps its own files during an attempt: in the run's store, which every node can reach."""

import pyarrow.fs

from maas_ray.store.objects import ObstoreStore, StorageSpec


def ray_storage(store: ObstoreStore, storage: StorageSpec) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a run's store, and the folder of Ray Train's files on it."""
    if store.root is not None:
        return pyarrow.fs.LocalFileSystem(), str(store.root / "ray")
    if storage.uri.startswith("s3://") and storage.endpoint:
        scheme, _, host = storage.endpoint.partition("://")
        host = host.rpartition("@")[2]  # requests are signed; the user info would only be shown in the dashboard
        filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=host, scheme=scheme, region=storage.region or "us-east-1"
        )
        return filesystem, f"{storage.uri.removeprefix('s3://').rstrip('/')}/ray"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage.uri)
    return filesystem, f"{path.rstrip('/')}/ray"


def forget(filesystem: pyarrow.fs.FileSystem, path: str) -> None:
    """Deletes a folder, if it exists."""
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)
