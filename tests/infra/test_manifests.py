"""The files of infra/: they fit the schemas, name real commands, one version, and no secret."""

import importlib
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from partialhn import __version__
from pipelines.cli.main import COMMANDS, _parse

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = sorted((INFRA / "kuberay").glob("*.yaml"))
RAY_KINDS = {
    "RayCluster": lambda spec: [spec],
    "RayJob": lambda spec: [spec["rayClusterSpec"]],
    "RayService": lambda spec: [spec["rayClusterConfig"]],
}
IMAGE = re.compile(rf"partialhn:{re.escape(__version__)}(-gpu)?")
SECRET_KEYS = re.compile(r"(?i)(password|secret|token|(^|[-_])key$)")


def documents(path):
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


RESOURCES = [(f"{path.name}: {each['kind']} {i}", each) for path in KUBERNETES
             for i, each in enumerate(documents(path))]


def compose():
    return documents(INFRA / "compose.yaml")[0]


def clusters():
    for name, each in RESOURCES:
        for spec in RAY_KINDS.get(each["kind"], lambda _: [])(each.get("spec", {})):
            yield name, spec


def pods():
    """Every pod description in the manifests."""
    for name, spec in clusters():
        yield f"{name}, head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}, {group['groupName']}", group["template"]
    for name, each in RESOURCES:
        if each["kind"] == "RayJob":
            yield f"{name}, submitter", each["spec"]["submitterPodTemplate"]
        if each["kind"] == "CronJob":
            yield name, each["spec"]["jobTemplate"]["spec"]["template"]


PODS = list(pods())


def walk(value, path=()):
    """Every leaf of nested YAML or JSON with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner, path)
    else:
        yield path, value


def test_compose_fits_the_specification():
    import check_jsonschema
    import jsonschema

    schema = (Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
              / "compose-spec.json")
    jsonschema.validate(compose(), json.loads(schema.read_text()))


WITH_SCHEMA = [(name, each) for name, each in RESOURCES
               if not each["apiVersion"].startswith(("ray.io/", "kustomize."))]
"""No published package has a schema of the others; their pods and fields are tested below."""


@pytest.mark.parametrize(("name", "each"), WITH_SCHEMA, ids=[name for name, _ in WITH_SCHEMA])
def test_kubernetes_resources_fit_their_schemas(name, each):
    import kubernetes_validate

    kubernetes_validate.validate(each, "1.34", strict=True)


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[name for name, _ in PODS])
def test_pods_fit_the_schema_and_the_restricted_standard(name, pod):
    import kubernetes_validate

    kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate",
                                  "metadata": {"name": "one"}, "template": pod}, "1.34",
                                 strict=True)
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False,
                                                "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert IMAGE.fullmatch(container["image"])
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-gpu") == gpu


CLUSTER_FIELDS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
                  "headGroupSpec", "workerGroupSpecs"}
KIND_FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": {"entrypoint", "submissionMode", "shutdownAfterJobFinishes",
               "ttlSecondsAfterFinished", "backoffLimit", "activeDeadlineSeconds",
               "submitterPodTemplate", "rayClusterSpec"},
    "RayService": {"serveConfigV2", "rayClusterConfig", "serviceUnhealthySecondThreshold",
                   "deploymentUnhealthySecondThreshold"},
}


def test_ray_resources_have_known_fields_only():
    for name, each in RESOURCES:
        if each["kind"] in KIND_FIELDS:
            assert each["apiVersion"] == "ray.io/v1"
            assert each["spec"].keys() <= KIND_FIELDS[each["kind"]], name


@pytest.mark.parametrize(("name", "spec"), list(clusters()), ids=[name for name, _ in clusters()])
def test_ray_clusters_are_private_and_ask_for_a_token(name, spec):
    import ray

    assert spec.keys() <= CLUSTER_FIELDS
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"].keys() <= {"serviceType", "rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas",
                                "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_network_policies_keep_gcs_and_dashboard_within():
    policies = {each["metadata"]["name"]: each["spec"] for _, each in RESOURCES
                if each["kind"] == "NetworkPolicy"}
    assert policies["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule["from"], f"{name} lets anybody in"
            outside = any("namespaceSelector" in each for each in rule["from"])
            ports = {port["port"] for port in rule.get("ports", [])}
            assert not outside or (ports and 6379 not in ports and 10001 not in ports), name


def command_lines():
    """Every command of ours that a file starts, as words after `partialhn`."""
    for name, service in compose()["services"].items():
        words = service.get("command") or []
        if words[:1] == ["partialhn"]:
            yield f"compose, {name}", words[1:]
        elif words[:1] == ["partialhn-on-cluster"]:
            yield f"compose, {name}", [words[2], "--ray-address", words[1], *words[3:]]
    for name, each in RESOURCES:
        if each["kind"] == "RayJob":
            words = shlex.split(each["spec"]["entrypoint"])
            assert words[0] == "partialhn"
            yield name, words[1:]
    for name, pod in PODS:
        for container in pod["spec"]["containers"]:
            if container.get("command"):
                assert container["command"][0] == "partialhn"
                yield name, container["command"][1:]


LINES = list(command_lines())


@pytest.mark.parametrize(("name", "words"), LINES, ids=[name for name, _ in LINES])
def test_commands_exist_and_take_their_options(name, words):
    assert words[0] in COMMANDS, f"{words[0]} is no command; there are {sorted(COMMANDS)}"
    _parse(list(words))


def test_programs_in_the_image_exist():
    for name, service in compose()["services"].items():
        program = (service.get("command") or [""])[0]
        if service["image"].startswith("partialhn:") and program not in ("ray", "partialhn"):
            assert (INFRA / "bin" / program).stat().st_mode & 0o111, name
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["partialhn"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("path", sorted((INFRA / "bin").iterdir()), ids=lambda path: path.name)
def test_programs_parse(path):
    text = path.read_text(encoding="utf-8")
    if "python" in text.splitlines()[0]:
        compile(text, str(path), "exec")
    else:
        subprocess.run(["sh", "-n", str(path)], check=True)


def test_the_server_of_a_ray_service_is_what_partialhn_serve_runs():
    import ray.serve.schema

    service = next(each for _, each in RESOURCES if each["kind"] == "RayService")
    config = ray.serve.schema.ServeDeploySchema.model_validate(
        yaml.safe_load(service["spec"]["serveConfigV2"]))
    application = config.applications[0]
    module, _, function = application.import_path.partition(":")
    app = getattr(importlib.import_module(module), function)(dict(application.args))
    assert [deployment.name for deployment in application.deployments] == [
        app._bound_deployment.name]


def test_images_have_the_version_of_the_package_and_every_other_tag_is_fixed():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    for service in compose()["services"].values():
        image = service["image"]
        assert IMAGE.fullmatch(image) or re.fullmatch(r"[a-z/]+:\d[\w.]*", image), image
    ray_up = documents(INFRA / "aws" / "ray-cluster.yaml")[0]["docker"]
    assert all(IMAGE.fullmatch(ray_up[key]) for key in ("image", "head_image", "worker_image"))
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".json", ""):
            for found in re.findall(r"partialhn:(\d[\w.]*)", path.read_text(encoding="utf-8")):
                assert found == __version__, path


def test_secrets_are_references():
    loose = []
    for path in (INFRA / "compose.yaml", *KUBERNETES, *sorted((INFRA / "aws").iterdir())):
        for each in documents(path):
            for keys, value in walk(each):
                name = keys[-1] if keys else ""
                if (SECRET_KEYS.search(name) and isinstance(value, str)
                        and not value.startswith(("${", "/run/secrets/", "~/"))
                        and keys[-2:-1] not in (("secretKeyRef",), ("authOptions",),
                                                ("tolerations",), ("secrets",))
                        and name not in ("HttpTokens", "secrets")
                        and not {"postgres_password", "mlflow_admin_password",
                                 "mlflow_session_key"} & set(keys)):
                    loose.append((path.name, keys, value))
    assert loose == []
    for name, pod in PODS:
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                assert "value" not in variable, f"{name}: {variable['name']} is written out"


def test_only_api_and_server_are_published_and_to_this_machine_only():
    published = {name: service["ports"] for name, service in compose()["services"].items()
                 if "ports" in service}
    assert published.keys() == {"mlflow", "serve"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert compose()["networks"]["private"] == {"internal": True}
    for name, service in compose()["services"].items():
        if service.get("command", [""])[0] == "ray":
            assert service["environment"]["RAY_AUTH_MODE"] == "token", name


POLICIES = sorted((INFRA / "aws").glob("*policy*.json"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_policies_name_every_action(path):
    for statement in json.loads(path.read_text())["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert re.fullmatch(r"(s3|ec2|iam):[A-Z]\w+", action), f"{path.name}: {action}"
        assert "NotAction" not in statement
        assert "NotResource" not in statement


def test_the_nodes_policy_covers_what_the_pipeline_writes_and_nothing_above_it():
    statements = json.loads((INFRA / "aws" / "iam-policy.json").read_text())["Statement"]
    resources = next(each["Resource"] for each in statements
                     if each["Sid"] == "ReadAndWriteOwnPrefixes")
    allowed = {re.fullmatch(r"arn:aws:s3:::REPLACE-BUCKET/store/(\w+)/\*", each)[1]
               for each in resources}
    written = {name for path in (*(ROOT / "pipelines").rglob("*.py"),
                                 *(ROOT / "partialhn").rglob("*.py"))
               for name in re.findall(r"(?:\.path|\.uri_of)\(\"([\w-]+)\"|root\}/(\w+)/",
                                      path.read_text(encoding="utf-8")) for name in name if name}
    assert {"features", "runs", "live", "datasets"} <= written
    assert written <= allowed


def test_the_ray_up_file_fits_rays_schema_and_has_spot_gpu_workers():
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = documents(INFRA / "aws" / "ray-cluster.yaml")[0]
    jsonschema.validate(cluster, schema)
    workers = cluster["available_node_types"]["gpu-spot"]["node_config"]
    assert workers["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["provider"]["use_internal_ips"]
    assert cluster["head_node_type"] in cluster["available_node_types"]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)


def dockerfile():
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def test_the_dockerfile_pins_copies_what_is_there_and_ends_as_nobody_special():
    steps = dockerfile()
    bases = [rest for word, rest in steps if word == "FROM"]
    arguments = dict(rest.split("=", 1) for word, rest in steps if word == "ARG")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments["BASE"])
    assert all(base.startswith(("${BASE}", "${ACCELERATOR}")) for base in bases)
    assert {base.split(" AS ")[1] for base in bases if " AS " in base} == {"build", "cpu", "gpu"}
    assert arguments["ACCELERATOR"] in ("cpu", "gpu")
    users = [rest for word, rest in steps if word == "USER"]
    assert users[-1] == "10001:10001"
    assert [word for word, _ in steps].index("USER") > max(
        i for i, (word, _) in enumerate(steps) if word == "FROM")
    assert any(word == "HEALTHCHECK" for word, _ in steps)
    assert not any(word == "ADD" for word, _ in steps)
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert "--require-hashes" in installs[0]
    assert all("--no-deps" in line for line in installs)
    for word, rest in steps:
        if word == "COPY" and "--from" not in rest:
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                source = source.replace("${LOCK}", arguments["LOCK"])
                assert (ROOT / source).exists(), source
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)(password|secret|token|key)\w*=\S", rest)


def test_what_is_built_from_lets_in_what_is_copied():
    let_in = [line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
              if line.startswith("!")]
    for word, rest in dockerfile():
        if word == "COPY" and "--from" not in rest:
            for source in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                source = source.replace("${LOCK}", "requirements.lock").rstrip("/")
                assert any(Path(source).match(each) for each in let_in), source
