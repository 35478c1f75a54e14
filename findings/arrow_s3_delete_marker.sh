#!/usr/bin/env bash
# Software: pyarrow 25.0.1 (and 26.0.1) with the S3 server of moto 5.2.5
# Expected: after delete_file of the only object under a prefix the bucket is empty, and a move
#   leaves one object.
# Seen: pyarrow then writes an empty object named like the folder, with a slash at its end. Deleting
#   needs the right to write, and a bucket from which everything was deleted is not empty.
# Matters: clean-up jobs with a role that may only delete fail. Tools that list by prefix see folders
#   of runs that are gone, and each costs a request to write.
# Another version: PYARROW_VERSION=26.0.1 findings/arrow_s3_delete_marker.sh
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


client.put_object(Bucket="bucket", Key="runs/7/shard", Body=b"features")
client.put_object(Bucket="bucket", Key="drafts/8/model", Body=b"weights")
print("at first:", objects())
s3.delete_file("bucket/runs/7/shard")
after_delete = objects()
print("after delete_file of runs/7/shard:", after_delete)
s3.move("bucket/drafts/8/model", "bucket/model")
after_move = objects()
print("after move of drafts/8/model to model:", after_move)
server.stop()
same = (after_delete == {"drafts/8/model": 7, "runs/7/": 0}
        and after_move == {"drafts/8/": 0, "model": 7, "runs/7/": 0})
raise SystemExit(None if same else "changed: other objects are left")
PYTHON
