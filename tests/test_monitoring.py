"""What Prometheus and Grafana are given: dashboard and alerts ask for what a server exports, and show all of it.

Their own programs judge the expressions where they are there (Debian's package `prometheus`).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("prometheus_client", reason="pip install 'hst_trt[serve]'")

from prometheus_client.parser import text_string_to_metric_families

from hst_trt.server.metrics import OUTCOMES
from hst_trt.server.service import ImageService

DOCKER = Path(__file__).resolve().parents[1] / "docker"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana" / "hst_trt.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [rule for group in yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
SCRAPED = {"instance", "job"}  # labels that Prometheus adds
Exported = dict[str, set[str]]

panels = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


@pytest.fixture(scope="module")
def exposition(demo_bundle: Path) -> str:
    """What a server shows after one request that uses both models."""
    from prometheus_client import generate_latest

    service = ImageService(demo_bundle, threads=1)
    service.start()
    _, drawing = service.check({"prompt": "a red apple", "num_inference_steps": 4, "stages": [1, 2, 1]})
    service.submit(drawing).future.result(60)
    service.close()
    return generate_latest(service.metrics.registry).decode()


@pytest.fixture(scope="module")
def exported(exposition: str) -> Exported:
    """Labels by name of series, without what the client's library adds of its own."""
    found: Exported = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in ALERTS:
        yield rule["alert"], rule["expr"]


EXPRESSIONS = list(expressions())
all_expressions = pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])


def series(expression: str) -> list[tuple[str, str]]:
    """Names of series, and what stands in the braces behind each."""
    return re.findall(r"\b(hst_trt_\w+|up)\b(?:\{([^}]*)\})?", expression)


def metric(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


# -- what is asked for, and what there is ----------------------------------------------------------------------------------
@all_expressions
def test_expressions_name_only_series_and_labels_that_a_server_exports(title: str, expression: str, exported: Exported) -> None:
    asked = series(expression)
    assert asked
    for name, matchers in asked:
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        if name == "up":
            assert labels <= SCRAPED
            continue
        assert name in exported, f"{title}: no server exports {name}"
        assert labels <= exported[name] | SCRAPED, f"{title}: {name}"
    of_all = set.intersection(*(exported[name] for name, _ in asked if name != "up")) if asked[0][0] != "up" else set()
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= of_all | SCRAPED, title


@all_expressions
def test_outcomes_are_those_that_there_are(title: str, expression: str) -> None:
    for values in re.findall(r'outcome=~?"([^"]*)"', expression):
        assert set(values.split("|")) <= set(OUTCOMES), title


def test_everything_that_a_server_exports_is_on_the_dashboard(exported: Exported) -> None:
    shown = {metric(name) for panel in PANELS for target in panel["targets"] for name, _ in series(target["expr"])}
    assert shown == {metric(name) for name in exported}


def test_counters_are_asked_for_as_rates_and_never_as_they_stand() -> None:
    for title, expression in expressions():
        for name in re.findall(r"\bhst_trt_\w+_total\b", expression):
            assert re.search(rf"(rate|increase)\({name}", expression), title


# -- the dashboard ---------------------------------------------------------------------------------------------------------
def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (a, b)
    assert max(place["x"] + place["w"] for place in places) == 24


@panels
def test_a_panel_says_what_it_shows_and_in_what_unit(panel: dict[str, Any]) -> None:
    assert panel["title"][0].isupper()
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    names = " ".join(name for target in panel["targets"] for name, _ in series(target["expr"]))
    if "_seconds" in names:
        assert defaults["unit"] == "s"
    elif "_bytes" in names:
        assert defaults["unit"] == "bytes"
    elif "ratio" in names:
        assert defaults["unit"] == "percentunit"
    assert defaults["thresholds"]["steps"][0]["value"] is None, (
        "Grafana wants a colour for everything below the first threshold"
    )


@panels
def test_a_panel_shows_the_chosen_servers_of_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "instance"}
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert all('instance=~"$instance"' in matchers for _, matchers in series(target["expr"])), target["expr"]
        assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= {"instance", "__rate_interval", "__range"}


@panels
def test_legends_name_labels_that_are_left(panel: dict[str, Any], exported: Exported) -> None:
    for target in panel["targets"]:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            grouped = re.search(r"\bby \(([^)]*)\)", target["expr"])
            left = (
                {part.strip() for part in grouped[1].split(",")}
                if grouped
                else exported[series(target["expr"])[0][0]] | SCRAPED
            )
            assert label in left, target["expr"]


# -- alerts ----------------------------------------------------------------------------------------------------------------
def test_there_are_alerts_for_a_growing_queue_for_errors_and_for_values_that_are_not_finite() -> None:
    named = {rule["alert"]: {name for name, _ in series(rule["expr"])} for rule in ALERTS}
    assert named["QueueGrows"] == {"hst_trt_requests_waiting"}
    assert named["RequestsFail"] == {"hst_trt_requests_total"}
    assert named["NotFinite"] == {"hst_trt_non_finite_total"}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert rule["annotations"]["action"].endswith(".")
    for path in re.findall(r"\b(?:docs|docker)/[\w./-]+\.md", rule["annotations"]["action"]):
        assert (DOCKER.parent / path).exists()


# -- how they find each other ----------------------------------------------------------------------------------------------
def test_prometheus_asks_the_servers_of_the_compose_file_and_grafana_asks_prometheus() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    asked = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    (job,) = asked["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    servers = {name for name, service in services.items() if "build" in service and service["command"][0] == "serve"}
    assert set(names["names"]) == servers
    for name in servers:
        assert services[name]["ports"] == [f"127.0.0.1:{names['port']}:{names['port']}"]
    assert {rule["expr"] for rule in ALERTS if "up{" in rule["expr"]} == {f'up{{job="{job["job_name"]}"}} == 0'}

    mounted = {
        target: DOCKER / source
        for source, target, _ in (v.split(":") for v in services["prometheus"]["volumes"] if v[0] == ".")
    }
    config = next(word.split("=")[1] for word in services["prometheus"]["command"] if word.startswith("--config.file="))
    assert mounted[config].name == "prometheus.yaml"
    for file in asked["rule_files"]:
        assert str(Path(config).with_name(file)) in mounted

    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].rpartition(':')[2]}"
    assert source["uid"] == DASHBOARD["templating"]["list"][0]["current"]["value"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/hst_trt.yaml").read_text())["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    assert f"./grafana/{Path(home).name}:{home}:ro" in services["grafana"]["volumes"]


def test_grafana_asks_nobody_outside_and_has_no_password_to_guess() -> None:
    said = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["grafana"]["environment"]
    for name in ("ANALYTICS_REPORTING", "ANALYTICS_CHECK_FOR_UPDATES", "ANALYTICS_CHECK_FOR_PLUGIN_UPDATES", "NEWS_NEWS_FEED"):
        assert said.get(f"GF_{name}_ENABLED", said.get(f"GF_{name}")) == "false", name
    assert said["GF_AUTH_BASIC_ENABLED"] == "false"
    assert said["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


# -- Prometheus itself -----------------------------------------------------------------------------------------------------
def promtool(*words: str) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not there: it comes with Prometheus, Debian's package of that name")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_configuration_the_alerts_and_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    promtool("check", "config", str(DOCKER / "prometheus.yaml"))
    filled = [
        expression.replace("$instance", ".*").replace("$__rate_interval", "1m").replace("$__range", "1h")
        for _, expression in expressions()
    ]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint=none", str(tmp_path / "panels.yaml"))


FIRING = {  # an alert, and series a minute apart that must make it fire within 20 minutes
    "ServerDown": [('up{job="hst_trt", instance="a"}', "1x5 0x15")],
    "NotFinite": [('hst_trt_non_finite_total{instance="a"}', "0x5 1x15")],
    "RequestsFail": [
        ('hst_trt_requests_total{instance="a", outcome="ok"}', "0+60x20"),
        ('hst_trt_requests_total{instance="a", outcome="error"}', "0+2x20"),
    ],
    "RequestsRefused": [
        ('hst_trt_requests_total{instance="a", outcome="ok"}', "0+60x20"),
        ('hst_trt_requests_total{instance="a", outcome="busy"}', "0+3x20"),
        ('hst_trt_requests_total{instance="a", outcome="deadline"}', "0+3x20"),
    ],
    "QueueGrows": [('hst_trt_requests_waiting{instance="a"}', "1+1x20")],
}
QUIET = [  # a server with enough to do, and nothing wrong
    ('up{job="hst_trt", instance="a"}', "1x20"),
    ('hst_trt_non_finite_total{instance="a"}', "0x20"),
    ('hst_trt_requests_total{instance="a", outcome="ok"}', "0+600x20"),
    ('hst_trt_requests_total{instance="a", outcome="invalid"}', "0+300x20"),
    ('hst_trt_requests_total{instance="a", outcome="error"}', "0+1x20"),
    ('hst_trt_requests_total{instance="a", outcome="busy"}', "0+10x20"),
    ('hst_trt_requests_waiting{instance="a"}', "3 5 0 2 7 1 4 0 6 3 2 5 1 4 0 2 3 5 1 2 0"),
]


@pytest.mark.parametrize("alert", ["", *FIRING])
def test_each_alert_fires_when_it_should_and_no_other_with_it(alert: str, tmp_path: Path) -> None:
    assert FIRING.keys() == {rule["alert"] for rule in ALERTS}
    given = [{"series": name, "values": values} for name, values in (FIRING[alert] if alert else QUIET)]
    fires = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
    check = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "20m", "exp_samples": fires}
    case = {
        "rule_files": [str(DOCKER / "alerts.yaml")],
        "evaluation_interval": "15s",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": [check]}],
    }
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    promtool("test", "rules", str(tmp_path / "case.yaml"))


@pytest.mark.slow
def test_prometheus_scrapes_a_server_and_every_panel_has_something_to_show(demo_bundle: Path, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not there: Debian's package of that name")
    # Answered twice at least while it is scraped, so that there are rates.
    with serving(demo_bundle) as server, prometheus(program, server, tmp_path) as asked:
        end = time.monotonic() + 12
        while time.monotonic() < end:
            httpx.post(
                f"{server}/v1/images/generations", json={"prompt": "a red apple", "stages": [1, 2, 1], "num_inference_steps": 4}
            )
        empty = set()
        for title, expression in EXPRESSIONS[: sum(len(panel["targets"]) for panel in PANELS)]:
            filled = expression.replace("$instance", ".*").replace("$__rate_interval", "5s").replace("$__range", "30s")
            answer = httpx.get(f"{asked}/api/v1/query", params={"query": filled}).json()
            assert answer["status"] == "success", (title, answer)
            if not answer["data"]["result"]:
                empty.add(title)
        assert not empty
        fired = httpx.get(f"{asked}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["name"]: (rule["health"], rule["state"]) for rule in fired} == {
            rule["alert"]: ("ok", "inactive") for rule in ALERTS
        }


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    command = [str(Path(sys.executable).with_name("hst-trt")), "serve", str(bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
            yield address
        finally:
            process.terminate()


@contextmanager
def prometheus(program: str, server: str, folder: Path) -> Iterator[str]:
    """Prometheus with our configuration, but for one server at an address of its own, asked every second."""
    asked = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    asked["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    asked["rule_files"] = [str(DOCKER / "alerts.yaml")]
    asked["scrape_configs"][0] = {"job_name": "hst_trt", "static_configs": [{"targets": [server.removeprefix("http://")]}]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(asked))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data", "web.listen-address": address}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())], stderr=log)
    try:
        end = time.monotonic() + 30
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/-/ready").status_code == 200:
                    break
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
