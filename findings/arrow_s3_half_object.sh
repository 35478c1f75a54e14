#!/usr/bin/env bash
# Software: pyarrow 25.0.1 (and 26.0.1) with the S3 server of moto 5.2.5
# Expected: S3 shows an object when its upload is complete, so an exception between two writes leaves
#   no object, and an older object under the key stays.
# Seen: leaving the block of open_output_stream closes the stream, and closing completes the upload.
#   What was written until then replaces the older object; where nothing was written yet, an empty
#   object does.
# Matters: "on S3 there is no need for a temporary name" holds for a process that is killed and not
#   for one that raises. A failed upload of a model replaces the good one with a part of the new.
# Another version: PYARROW_VERSION=26.0.1 findings/arrow_s3_half_object.sh
set -euo pipefail
packages=(
  "pyarrow==${PYARROW_VERSION:-25.0.1}"
  "moto[server]==${MOTO_VERSION:-5.2.5}"
  "boto3==${BOTO3_VERSION:-1.44.5}"
)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v uv > /dev/null; then
  uv venv --quiet "$folder/venv"
  uv pip install --quiet --python "$folder/venv/bin/python" "${packages[@]}"
else
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
fi
cd "$folder"
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_EC2_METADATA_DISABLED=true
printf 'with %s\n' "${packages[@]}"
venv/bin/python - << 'PYTHON'
import logging

import boto3
import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
keys = {"aws_access_key_id": "name", "aws_secret_access_key": "secret"}
client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
client.create_bucket(Bucket="bucket")
s3 = pafs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1",
                       access_key="name", secret_key="secret")


def objects():
    listing = client.list_objects_v2(Bucket="bucket")
    return {item["Key"]: item["Size"] for item in listing.get("Contents", [])}


for key in ("first_half", "nothing", "many_parts"):
    client.put_object(Bucket="bucket", Key=key, Body=b"the whole older model")
part = bytes(6 * 2 ** 20)
for key, chunks in (("first_half", [b"new mod"]), ("nothing", []), ("many_parts", [part, part])):
    try:
        with s3.open_output_stream(f"bucket/{key}") as stream:
            for chunk in chunks:
                stream.write(chunk)
            raise ValueError("the rest cannot be read")
    except ValueError as error:
        print(f"{key}: {sum(map(len, chunks))} bytes written, then {error!r}; "
              f"the object now has {objects()[key]} bytes")
sizes = objects()
server.stop()
same = sizes == {"first_half": 7, "many_parts": 2 * len(part), "nothing": 0}
raise SystemExit(None if same else "changed: other objects are left")
PYTHON
