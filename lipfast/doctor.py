"""What this machine offers lipfast, and why a part of it cannot run."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import lipfast
from lipfast.ops import _dispatch


def examine() -> dict[str, Any]:
    """Versions, CPU, instruction sets, threads, devices and backends, JSON-able."""
    return {
        "lipfast": lipfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": _instruction_sets(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: _backend(name) for name in _dispatch.BACKENDS},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("LIPFAST_")},
    }


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _instruction_sets() -> dict[str, Any]:
    try:
        import lipfast._C as _C
    except ImportError as error:
        return {"in_use": None, "available": [], "reason": f"the extension is not built ({error})"}
    try:
        return {"in_use": _C.isa(), "available": list(_C.available_isas())}
    except RuntimeError as error:  # LIPFAST_ISA names one that cannot run here
        return {"in_use": None, "available": list(_C.available_isas()), "reason": str(error)}


def _backend(name: str) -> dict[str, Any]:
    """Whether a backend can run here, and if not, why."""
    needs = _dispatch.BACKENDS[name][0]
    try:
        loaded = _dispatch.load(name)
    except ImportError as error:
        return {"usable": False, "reason": f"its build is broken: {error}"}
    if isinstance(loaded, ModuleNotFoundError):
        return {"usable": False, "reason": f"not installed: {loaded}"}
    if name == "cpu" and (reason := _instruction_sets().get("reason")):
        return {"usable": False, "reason": reason}
    if needs == "cuda" and not torch.cuda.is_available():
        return {"usable": False, "reason": "installed, but torch finds no CUDA device"}
    return {"usable": True, "reason": None}


def lines(facts: dict[str, Any]) -> list[str]:
    """``examine``'s facts for people."""
    sets = facts["instruction_sets"]
    available = ", ".join(sets["available"]) or "none"
    shown = [
        f"lipfast {facts['lipfast']}, torch {facts['torch']}, Python {facts['python']}, {facts['system']}",
        f"CPU: {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads for torch",
        f"instruction sets: {available}; in use: {sets['in_use'] or sets['reason']}",
        f"CUDA device: {facts['cuda_device'] or 'none'}",
    ]
    for name, state in facts["backends"].items():
        shown.append(f"backend {name}: {'usable' if state['usable'] else state['reason']}")
    shown += [f"{name}={value}" for name, value in facts["environment"].items()]
    return [line.replace("\n", " ") for line in shown]
