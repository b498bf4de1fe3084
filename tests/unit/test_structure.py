"""The shape of the house, read from the syntax trees: arrows, circles, fences, sizes, typed signatures, what is not to be found.

Each test looks at every file and names all that it finds. ``test_measures`` holds the measures that are numbers.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from tests.source import PACKAGE, ROOT, functions, imported_modules, imports, module_of, places, trees

LINES, FUNCTION_LINES = 500, 60
# A package may import packages of a lower level, and itself. Nothing imports sideways.
LEVELS = {
    "errors": 0,
    "version": 0,
    "device": 0,
    "config": 1,
    "obs": 1,
    "sample": 2,
    "batch": 2,
    "algo": 3,
    "plan": 3,
    "cpu": 4,
    "weights": 4.5,
    "data": 5,
    "model": 5,
    "parallel": 5,
    "learn": 6,
    "rollout": 6,
    "reward": 6,
    "env": 6.5,
    "methods": 7,
    "pump": 7,
    "workers": 7,
    "run": 8,
    "__init__": 9,
    "cli": 10,
    "__main__": 11,
}
# Where a package from outside may be imported; a path is a file or a folder below togi/.
FENCES = {
    "ray": ("workers/ray/",),
    "vllm": ("rollout/vllm_engine.py",),
    "deepspeed": ("parallel/deepspeed.py",),
    "torch.distributed": ("parallel/", "weights/carriers.py"),
    "transformers": (
        "model/",
        "learn/schedule.py",
        "data/chat.py",
        "rollout/transformers_engine.py",
        "rollout/transformers_engine.py",
    ),
    "huggingface_hub": ("weights/files.py", "run/preflight.py"),
    "peft": ("model/",),
    "bitsandbytes": ("model/",),
    "wandb": ("obs/sinks.py",),
    "torch.utils.tensorboard": (),
    "tensorboard": ("obs/sinks.py",),
}
# Modules behind the door ``togi.cpu``.
CPU = {path.stem for path in (PACKAGE / "cpu").glob("*.py")}
TORCH_FREE = ("config", "plan", "obs", "errors", "sample", "version")
# Attributes that objects of other projects may lack, or that only a name knows: "file: function" and how many. Of our own
# records none is looked up by a name.
FOREIGN_ATTRIBUTES = Counter(
    {
        # the configuration of a model: each architecture has settings of its own
        "model/checkpoint.py: save_hf": 1,
        "model/generate.py: positions": 1,
        "model/loading.py: load_scalar_model": 1,
        "model/policy.py: ScalarModel.reward_mean": 1,
        "model/policy.py: ScalarModel.reward_std": 1,
        "model/ring_attention.py: refuse_ring": 1,
        "model/support.py: logit_transform": 3,
        "model/support.py: refuse_unsupported": 2,
        "rollout/transformers_engine.py: Masks.of": 3,
        "rollout/transformers_engine.py: TransformersCore.__init__": 2,
        # modules and parameters that a library marked
        "model/adapters.py: full_weight": 1,
        "model/layers.py: use_recompute": 1,
        "parallel/deepspeed.py: _gathered": 1,
        "parallel/deepspeed.py: _partition": 1,
        "rollout/vllm_engine.py: _start_reload": 2,
        # torch's data types, C functions and Ray's remote methods by their names
        "weights/adapters.py: Base._keep": 1,
        "model/checkpoint.py: expected_manifest": 1,
        "weights/buckets.py: Bucket.unpack": 1,
        "weights/buckets.py: TensorSpec.nbytes": 1,
        "rollout/transformers_engine.py: TransformersCore._load": 1,
        "workers/ray/cluster.py: RayWorkers.call": 1,
        # what an operating system or an exception may not have
        "data/shards.py: _number_of_processes": 1,
        "cpu/kernels.py: compiled": 1,
        "obs/run_dir.py: RunDirectory._write_info": 1,
        "obs/way_out.py: writing": 1,
        "plan/machine.py: keep_freed": 1,
        "plan/machine.py: return_freed": 1,
        # the user's module, and what its function returned
        "config/fields.py: _hook": 1,
        "env/hosted.py: Instance._is_done": 1,
        "env/hosted.py: Instance._result": 1,
        "reward/wire.py: plain_value": 1,
        "reward/worker.py: _find": 3,
    }
)
# Where any exception is caught and another one, or the same, is raised: something is closed, or the user told what failed.
RAISED_AGAIN = Counter(
    {
        "data/chat.py: _rendered": 1,
        "data/chat.py: load_tokenizer": 1,
        "data/chat.py: render_marked": 1,
        "data/row_log.py: RowLog.__enter__": 1,
        "learn/checkpoint.py: BestStore.write": 1,
        "learn/hooks.py: _import": 1,
        "learn/hooks.py: load.call": 1,
        "learn/checkpoint.py: _writing": 1,
        "model/generate.py: _generate": 1,
        "obs/way_out.py: writing": 1,
        "run/preflight.py: _downloaded": 1,
        "reward/function.py: load_by_value": 1,
        "reward/worker.py: load_object": 1,
        "rollout/collect.py: _run_one": 1,
        "run/journal.py: open_journal": 1,
        "run/healing.py: workers": 1,
        "workers/worker_group.py: ModelScores._drain": 1,
        "workers/ray/__init__.py: start": 1,
    }
)
# Where any exception ends: it becomes a value that somebody waits for, or a line that somebody reads.
CAUGHT = Counter(
    {
        # code that is not ours: an environment, an agent, a reward, a loss, a program under test, a tracker
        "env/agent_process.py: episode": 1,
        "env/hosted.py: Instance.reply": 1,
        "env/hosted.py: Instance._call": 1,
        "obs/sinks.py: Background._work": 1,
        "reward/sandbox/calls.py: _answer": 1,
        "reward/sandbox/calls.py: judge": 2,
        "reward/verifiers/reasoning_gym.py: score": 1,
        "reward/worker.py: reply": 1,
        # the edge of a thread, a process or a request: the caller is on the other side
        "env/proxy.py: Proxy._guard": 1,
        "obs/sinks.py: _wandb_main": 1,
        "reward/server.py: Batcher._drain": 1,
        "reward/server.py: RewardServer._guard": 1,
        "rollout/engine.py: RolloutEngine._admit": 1,
        "rollout/engine.py: RolloutEngine.answer": 1,
        "rollout/engine.py: RolloutEngine._run": 2,
        # Ray has no class for a slow start, after which it is started again
        "workers/ray/cluster.py: _start": 1,
        # the last word: the exit status, and a failure while another one is on its way
        "cli/main.py: main": 1,
        "obs/way_out.py: way_out": 1,
    }
)


def package_of(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_arrows_point_right_and_make_no_circle() -> None:
    wrong = []
    for path, tree in trees().items():
        own = package_of(path)
        for name in (name for name in imports(tree) if within(name, "togi")):
            other = package_of(name.split(".")[1]) if "." in name else "__init__"
            if other in LEVELS and other != own and LEVELS[other] >= LEVELS[own]:
                wrong.append(f"{path} ({own}) imports {name}")
    try:
        # imports inside functions count, those for the type checker alone do not
        TopologicalSorter({module_of(path): set(imported_modules(tree)) for path, tree in trees().items()}).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' -> '.join(error.args[1])}")
    assert wrong == []


def test_fences() -> None:
    wrong = []
    for path, tree in trees().items():
        for name in imports(tree):
            wrong += [
                f"{path} imports {name}"
                for package, allowed in FENCES.items()
                if within(name, package) and not path.startswith(allowed)
            ]
            if (
                name.startswith("togi.cpu.")
                and name.count(".") > 1
                and package_of(path) != "cpu"
                and name.split(".")[2] in CPU
            ):
                wrong.append(f"{path} imports {name}: what is for CPUs alone has one door, togi.cpu")
            if package_of(path) in TORCH_FREE and within(name, "torch"):
                wrong.append(f"{path} must not import torch")
    assert wrong == []
    used = {
        (package, path)
        for path, tree in trees().items()
        for package in FENCES
        if any(within(name, package) for name in imports(tree))
    }
    idle = [
        (package, place)
        for package, allowed in FENCES.items()
        for place in allowed
        if not any(name == package and path.startswith(place) for name, path in used)
    ]
    assert idle == [], "these do not use what they may use"


def test_size_bars() -> None:
    wrong = []
    for path, tree in trees().items():
        lines = len((PACKAGE / path).read_text().splitlines())
        if lines > LINES:
            wrong.append(f"{path} has {lines} lines")
        for node in functions(tree):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                wrong.append(f"{path}: {node.name} has {length} lines")
    assert wrong == []


def test_signatures_are_typed() -> None:
    wrong = []
    for path, tree in trees().items():
        for node in functions(tree):
            if node.returns is None:
                wrong.append(f"{path}: {node.name} has no return type")
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            wrong += [
                f"{path}: {node.name}({argument.arg}) is not typed"
                for argument in arguments
                if argument.arg not in ("self", "cls", "ctx") and argument.annotation is None
            ]
    assert wrong == []


def test_no_print_no_catch_all_no_soft_getattr() -> None:
    prints, attributes, caught, raised = [], Counter[str](), Counter[str](), Counter[str]()
    for path, tree in trees().items():
        for place, node in places(path, tree):
            match node:
                case ast.Call(func=ast.Name(id="print")) if package_of(path) != "cli":
                    prints.append(place)
                case ast.Call(func=ast.Name(id="getattr" | "hasattr")):
                    attributes[place] += 1
                case ast.ExceptHandler() if catches_all(node):
                    (raised if isinstance(node.body[-1], ast.Raise) else caught)[place] += 1
    assert prints == []
    # both ways: what is no longer needed leaves the lists above
    assert sorted((attributes - FOREIGN_ATTRIBUTES).elements()) == []
    assert sorted((FOREIGN_ATTRIBUTES - attributes).elements()) == []
    assert (caught - CAUGHT, CAUGHT - caught) == (Counter(), Counter())
    assert (raised - RAISED_AGAIN, RAISED_AGAIN - raised) == (Counter(), Counter())


def catches_all(handler: ast.ExceptHandler) -> bool:
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names
    )


def test_every_module_says_what_it_is() -> None:
    assert [path for path, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_no_test_imports_another_test() -> None:
    """What tests share lies in helper modules and conftest.py."""
    assert list(shared_by_tests()) == []


def shared_by_tests() -> Iterator[str]:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name in imports(ast.parse(path.read_text())):
            if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[1:3]):
                yield f"{path.relative_to(ROOT)} imports {name}"
