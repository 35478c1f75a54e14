"""An S3 service for the tests: the one PARTIALHN_TEST_S3_ENDPOINT names, or moto's."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import uuid

import pytest

from pipelines.platform.s3 import s3_client
from pipelines.platform.storage import open_storage

MOTO = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass(frozen=True)
class Service:
    """Where it answers; `real`: it checks signatures and permissions, and races are races."""

    endpoint: str
    region: str
    real: bool


@pytest.fixture(scope="session")
def service():
    endpoint = os.environ.get("PARTIALHN_TEST_S3_ENDPOINT")
    region = os.environ.get("PARTIALHN_TEST_S3_REGION", "us-east-1")
    if endpoint:
        yield Service(endpoint, region, real=True)
        return
    with subprocess.Popen([sys.executable, "-c", MOTO], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as moto:
        port = moto.stdout.readline().strip()
        assert port.isdigit(), "moto did not start"
        yield Service(f"http://127.0.0.1:{port}", region, real=False)
        moto.stdin.close()


@pytest.fixture(scope="session")
def bucket(service):
    """A bucket of this session, gone with all that is in it afterwards."""
    name = f"partialhn-test-{uuid.uuid4().hex[:12]}"
    storage = open_storage(f"s3://{name}", service.endpoint, service.region)
    client = s3_client(storage.s3)
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=item["Key"])
    with contextlib.suppress(client.exceptions.ClientError):  # parts of uploads cut on purpose
        client.delete_bucket(Bucket=name)


@pytest.fixture
def prefix(bucket):
    """bucket/prefix of one test's own."""
    return f"{bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def storage(service, prefix):
    return open_storage(f"s3://{prefix}?endpoint={service.endpoint}&region={service.region}")


@pytest.fixture
def proxy(service):
    """A proxy before the service that passes everything on until it is told otherwise."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("fault_proxy", Path(__file__).with_name("proxy.py"))
    module = module_from_spec(spec)
    sys.modules["fault_proxy"] = module
    spec.loader.exec_module(module)
    proxy = module.FaultProxy(service.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def shaky(proxy, service, prefix):
    """A storage behind the proxy; a second of silence is a timeout."""
    return open_storage(f"s3://{prefix}?endpoint={proxy.endpoint}&region={service.region}"
                        "&timeout=1")
