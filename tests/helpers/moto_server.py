"""A moto server on loopback, an object store for tests."""

import subprocess
import sys
import urllib.request

import pytest

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # until the test session ends
"""


@pytest.fixture(scope="module")
def server():
    """A moto server with the bucket `bucket`; obstore finds it through the environment."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "stdin": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER], **quiet)
    endpoint = process.stdout.readline().strip()
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}).items():
            patch.setenv(name, value)
        yield endpoint
    process.kill()
    process.communicate()
