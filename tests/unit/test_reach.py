"""An artifact store that does not answer or denies access is told from files that are damaged."""

import pyarrow as pa
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from pipelines.registry.reach import out_of_reach


def of_s3(code, status):
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},
                       "HeadObject")


@pytest.mark.parametrize("error", [
    of_s3("403", 403), of_s3("SlowDown", 503), NoCredentialsError(),
    EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), PermissionError(13, "no", "x"),
    ConnectionRefusedError(111, "Connection refused"), TimeoutError(),
    OSError("When getting information: AWS Error ACCESS_DENIED during HeadObject operation"),
    pa.ArrowException("AWS Error NETWORK_CONNECTION during GetObject operation"),
    RuntimeError("The following failures occurred while downloading one or more artifacts:\n"
                 "##### model.json #####\n"
                 "An error occurred (403) when calling the HeadObject operation: Forbidden"),
    RuntimeError("API request failed with error code 502 != 200")])
def test_a_store_out_of_reach_says_nothing_about_its_files(error):
    assert out_of_reach(error)
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = error
    assert out_of_reach(wrapped) == out_of_reach(error)


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file or directory", "bucket/x"), of_s3("404", 404),
    of_s3("NoSuchKey", 404), ValueError("Expecting value: line 503 column 1"), KeyError("tasks"),
    OSError("AWS Error NO_SUCH_KEY during GetObject operation: (404)")])
def test_missing_and_damaged_files_are_within_reach(error):
    assert out_of_reach(error) == ""


def test_the_reason_is_the_line_that_says_it():
    error = RuntimeError("failures occurred:\n##### model.json #####\n  Connection refused by host")
    assert out_of_reach(error) == "Connection refused by host"
