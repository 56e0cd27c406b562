"""Runs scripts: in this process, or the training script in another one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEARTBEAT_TIMEOUT = 10


def call(main, capsys, *args):
    """Returns exit status, standard output and standard error of a command in this process."""
    status = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refusal(main, capsys, *args):
    """Returns the one line with which a command refuses its arguments."""
    status, _, err = call(main, capsys, *args)
    assert status == 2
    assert err.count("\n") == 1
    return err


def start(*args, cwd, devices=1, quick=False):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # As in this process, but with devices of its own.
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick)
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *map(str, args)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(*args, cwd, own=((), ()), devices=1):
    """The same run in several processes, of `devices` each; `own` has options of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ["--distributed", "--coordinator-address", f"127.0.0.1:{port}"]
    together += ["--num-processes", len(own), "--heartbeat-timeout", HEARTBEAT_TIMEOUT]
    return [
        start(
            *args, *options, *together, "--process-id", number, cwd=cwd, devices=devices, quick=True
        )
        for number, options in enumerate(own)
    ]
