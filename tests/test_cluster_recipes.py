"""The files of recipes/cluster, dry: what they would run is understood by torchrun and by holdfast."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from holdfast.cli.align import make_parser

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "recipes" / "cluster"
SCRIPTS = [CLUSTER / "torchrun.sh", CLUSTER / "patcher.slurm"]
# `man sbatch` and `man srun`.
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "exclusive",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
}
SRUN = {"nodes", "ntasks", "ntasks-per-node", "relative", "cpus-per-task", "kill-on-bad-exit"}


@pytest.fixture(autouse=True)
def _fsdp_leaves_a_variable(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it, for good


def bash(*words, folder=ROOT, **variables):
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["bash", *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)


def printed(*words, **variables):
    """The commands that a script would run."""
    done = bash(*words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def understood(command):
    """torchrun's arguments, then the model flags, data flags and configuration that holdfast makes of the rest."""
    assert command[0] == "torchrun"
    torchrun = torchrun_parser().parse_args(command[1:])
    assert (torchrun.module, torchrun.training_script) == (True, "holdfast")
    assert torchrun.training_script_args[:2] == ["align", "patcher"]
    return torchrun, *make_parser("patcher").parse(torchrun.training_script_args[2:])[:3]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_proper_bash_and_can_be_run(script):
    assert bash("-n", script).stderr == ""
    assert os.access(script, os.X_OK)


def test_the_defenders_command(tmp_path):
    [command] = printed(SCRIPTS[0], "defender", "--max_steps", "7", NODES="2", HEAD="n1", RUN=str(tmp_path))
    torchrun, model, data, config = understood(command)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.max_restarts) == ("2", "8", 0)
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "n1:29500")
    assert torchrun.shutdown_timeout == 600
    assert (config.role, config.exchange) == ("defender", f"{tmp_path}/exchange")
    assert (config.output_dir, config.resume_from_checkpoint) == (f"{tmp_path}/hardened", None)
    assert (config.attack_steps, config.attack_every, config.max_steps) == (500, 1000, 7)
    assert config.fsdp is True
    assert config.fsdp_plugin_args["fsdp_version"] == 2
    assert config.fsdp_plugin_args["reshard_after_forward"] is True
    assert config.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    assert config.gradient_checkpointing
    assert (model.dtype, config.bf16) == ("float32", True)
    assert data.attack_data == "simulated_attack.jsonl"


def test_an_attackers_command(tmp_path):
    [command] = printed(SCRIPTS[0], "attacker", "second", "--use_peft", GPUS="4", RUN=str(tmp_path))
    torchrun, model, _, config = understood(command)
    assert (torchrun.nnodes, torchrun.nproc_per_node) == ("1", "4")
    assert (config.role, config.attacker_name) == ("attacker", "second")
    assert (config.exchange, config.output_dir) == (f"{tmp_path}/exchange", f"{tmp_path}/attackers/second")
    assert config.exchange_timeout == 24 * 3600
    assert config.resume_from_checkpoint is None
    assert model.use_peft


@pytest.mark.parametrize(("file", "resumes"), [("trainer_state.json", "last"), ("model.safetensors", None)])
def test_only_the_defender_goes_on_and_only_from_a_whole_checkpoint(tmp_path, file, resumes):
    checkpoint = tmp_path / "hardened" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / file).touch()
    commands = [printed(SCRIPTS[0], *role, RUN=str(tmp_path))[0] for role in (["defender"], ["attacker", "one"])]
    assert [understood(command)[3].resume_from_checkpoint for command in commands] == [resumes, None]


@pytest.mark.parametrize("words", [[], ["judge"], ["attacker"]])
def test_a_role_has_to_be_known_and_an_attacker_named(words):
    done = bash(SCRIPTS[0], *words, DRY_RUN="1")
    assert done.returncode != 0
    assert "expected a" in done.stderr
    assert done.stdout == ""


def test_a_job_gives_every_role_nodes_of_its_own(tmp_path):
    settings = {"ATTACKERS": "2", "ATTACKER_NODES": "2", "SLURM_JOB_NUM_NODES": "7", "RUN": str(tmp_path)}
    lines = printed(SCRIPTS[1], "--attack_steps", "1500", **settings)
    steps, commands = lines[::2], [understood(command) for command in lines[1::2]]
    nodes = []
    for step in steps:
        assert step[0] == "srun"
        options = dict(word.removeprefix("--").split("=") for word in step[1:] if word.startswith("--") and "=" in word)
        assert options.keys() == SRUN
        assert (options["ntasks"], options["ntasks-per-node"]) == (options["nodes"], "1")
        nodes.append(range(int(options["relative"]), int(options["relative"]) + int(options["nodes"])))
    assert nodes == [range(3), range(3, 5), range(5, 7)]
    assert [torchrun.nnodes for torchrun, *_ in commands] == ["3", "2", "2"]
    assert [torchrun.rdzv_endpoint.partition(":")[0] for torchrun, *_ in commands] == ["node1", "node4", "node6"]
    assert len({torchrun.rdzv_id for torchrun, *_ in commands}) == 3
    configs = [config for *_, config in commands]
    assert [config.role for config in configs] == ["defender", "attacker", "attacker"]
    assert len({config.attacker_name for config in configs[1:]}) == 2
    assert len({config.seed for config in configs}) == 3
    assert {config.exchange for config in configs} == {f"{tmp_path}/exchange"}
    assert {config.attack_steps for config in configs} == {1500}


def test_by_default_a_job_has_a_node_for_each_role():
    lines = printed(SCRIPTS[1])
    assert [understood(command)[3].role for command in lines[1::2]] == ["defender", "attacker"]


def test_too_few_nodes_are_refused():
    done = bash(SCRIPTS[1], DRY_RUN="1", ATTACKERS="2", SLURM_JOB_NUM_NODES="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 nodes leave none for the defender beside 2 x 1" in done.stderr


def test_sbatch_options_are_known_and_leave_time_to_save():
    text = SCRIPTS[1].read_text()
    lines = re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)
    assert text.index("#SBATCH") < text.index("set -euo"), "sbatch stops looking at the first command"
    options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert options.keys() == SBATCH
    assert len(options) == len(lines)
    assert re.fullmatch(r"\d+:\d\d:\d\d", options["time"])
    to_whom, seconds = re.fullmatch(r"(.*)@(\d+)", options["signal"]).groups()
    [command] = printed(SCRIPTS[0], "defender")
    assert to_whom == "B:TERM"
    assert int(seconds) > understood(command)[0].shutdown_timeout
    assert int(options["gpus-per-node"]) == int(understood(command)[0].nproc_per_node)
    assert int(options["nodes"]) == len(printed(SCRIPTS[1])) // 2


COMMAND = re.compile(r"^    (holdfast align patcher (?:.*\\\n)*.*)$", flags=re.MULTILINE)


def test_the_commands_that_the_document_shows():
    commands = COMMAND.findall((ROOT / "docs" / "scaling.md").read_text("utf-8"))
    assert commands
    for command in commands:
        make_parser("patcher").parse(shlex.split(command.replace("\\\n", ""))[3:])


# ---------------------------------------------------------------------- a job, with a SLURM of three short scripts

SLURM = {
    # A step notes its role once it listens to signals, and does what the test wants of that role.
    "srun": r"""
        while [[ $1 == --* ]]; do shift; done
        name=${3:-$2}; [[ $2 == defender ]] && name=defender
        trap 'echo "$name" >>"$FAKE/left"; exit 1' TERM
        echo $$ >>"$FAKE/pids"; echo "$name" >>"$FAKE/steps"
        behaves=$ATTACKER; [[ $name == defender ]] && behaves=$DEFENDER
        [[ $name != defender || $behaves == runs ]] || until (($(wc -l <"$FAKE/steps") >= STEPS)); do sleep 0.02; done
        case $behaves in
            finishes) sleep 0.2; mkdir -p "$RUN/hardened"; touch "$RUN/hardened/holdfast.json" ;;
            fails) exit 1 ;;
            runs) while :; do sleep 0.02; done ;;
        esac
    """,
    "scancel": r"""[[ $* == "--signal=TERM 77" ]] && xargs kill -TERM <"$FAKE/pids" 2>/dev/null; true""",
    "scontrol": r"""
        if [[ $1 == show ]]; then printf 'a\nb\n'; else echo "$*" >>"$FAKE/scontrol"; fi
    """,
}


@pytest.fixture
def job(tmp_path):
    """Starts the job with a defender and an attacker that behave as told, the former once there were so many steps."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/usr/bin/env bash\n{text}\n")
        script.chmod(0o755)
    jobs = []

    def start(defender, attacker, steps=2, **variables):
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(tmp_path),
            "RUN": str(tmp_path / "run"),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "[a-b]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "DEFENDER": defender,
            "ATTACKER": attacker,
            "STEPS": str(steps),
            **variables,
        }
        jobs.append(subprocess.Popen(["bash", str(SCRIPTS[1])], env=environment, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start
    left = [process.pid for process in jobs if process.poll() is None]  # where a test failed
    for pid in [*left, *map(int, lines(tmp_path / "pids"))] if left else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def ended(process):
    _, complaints = process.communicate(timeout=20)
    return process.returncode, complaints


def test_a_finished_job_ends_its_attackers_and_is_not_queued_again(tmp_path, job):
    assert ended(job("finishes", "runs")) == (0, "")
    assert lines(tmp_path / "left") == ["attacker-1"]
    assert lines(tmp_path / "scontrol") == []


def test_a_job_told_to_stop_lets_every_role_leave_and_is_queued_again(tmp_path, job):
    process = job("runs", "runs", SLURM_RESTART_COUNT="9")
    while len(lines(tmp_path / "steps")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 1
    assert sorted(lines(tmp_path / "left")) == ["attacker-1", "defender"]
    assert sorted(lines(tmp_path / "steps")) == ["attacker-1", "defender"]
    assert lines(tmp_path / "scontrol") == ["requeue 77"]


def test_an_attacker_that_fails_is_started_again_so_often(tmp_path, job):
    assert ended(job("finishes", "fails", steps=3, RESTARTS="1"))[0] == 0
    assert sorted(lines(tmp_path / "steps")) == ["attacker-1", "attacker-1", "defender"]


@pytest.mark.parametrize(("queued", "expected"), [("0", ["requeue 77"]), ("3", [])])
def test_a_job_whose_defender_fails_is_queued_again_so_often(tmp_path, job, queued, expected):
    assert ended(job("fails", "runs", SLURM_RESTART_COUNT=queued))[0] == 1
    assert lines(tmp_path / "left") == ["attacker-1"]
    assert lines(tmp_path / "scontrol") == expected


def test_a_finished_run_is_not_run_again(tmp_path, job):
    marker = tmp_path / "run" / "hardened" / "holdfast.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    code, complaints = ended(job("runs", "runs"))
    assert code == 2
    assert "holds a finished run" in complaints
    assert lines(tmp_path / "steps") == []
