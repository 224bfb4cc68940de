"""What an Apple GPU lacks, seen without one: operations that have no kernel there, float64, tensors left on the CPU.

A tensor below says that it lies on MPS, and computes on the CPU. Each operation that meets it is held against PyTorch's
own list of kernels.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sedd
import train


@cache
def kernels():
    """{"add.Tensor": its entry in native_functions.yaml}; a variant that is generated has that of which it is made."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found, made = {}, {}
    for entry in yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        found[entry["func"].split("(")[0]] = entry
        made |= {name.strip(): entry for name in entry.get("autogen", "").split(",")}
    return made | found


def runs_on_mps(name):
    """Whether the operation "add.Tensor" has a kernel for MPS, or is composite: made of others, for any device.

    A composite one can be a mere wrapper of its own form with out=; then that one must have the kernel.
    """
    entry, (base, _, overload) = kernels().get(name), name.partition(".")
    if entry is None:
        return False
    if "structured_delegate" in entry:
        return runs_on_mps(entry["structured_delegate"])
    keys = {key.strip() for keys in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for key in keys.split(",")}
    if "MPS" in keys:
        return True
    wrapped = [f"{base}.{overload}_out"] if overload else [f"{base}.out", f"{base}.values"]
    wrapped = [out for out in wrapped if "CPU" in str(kernels().get(out, {}).get("dispatch", "")) and out != name]
    return any(key.startswith("CompositeE") or key == "CompositeImplicitAutograd" for key in keys) and all(
        runs_on_mps(out) for out in wrapped)  # fmt: skip


class OnMPS(torch.Tensor):
    """A tensor that says it is on MPS. Its numbers are in `on_cpu`. PyTorch itself takes it for one on `meta`, for which
    each build has what autograd and indexing ask of a device.
    """

    device = property(lambda self: torch.device("mps"))

    @staticmethod
    def __new__(cls, on_cpu):
        return torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device="meta")  # fmt: skip

    def __init__(self, on_cpu):
        if on_cpu.dtype in (torch.float64, torch.complex128):
            raise TypeError("MPS has no float64")
        self.on_cpu = on_cpu

    def __repr__(self):
        return f"OnMPS({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("outside of the mode below")


class MPS(TorchDispatchMode):
    """Gives what is asked for on MPS, and notes in `lacking` which operations MPS has no kernel for."""

    def __init__(self):
        super().__init__()
        self.seen, self.lacking = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_mps = any(isinstance(tensor, OnMPS) for tensor in tensors)
        device = kwargs.get("device")
        to_mps = from_mps if device is None else torch.device(device).type in ("mps", "meta")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        elif from_mps:  # only numbers may come from the CPU, and copies
            others = [tensor for tensor in tensors if not isinstance(tensor, OnMPS) and tensor.dim()]
            assert not others or function.overloadpacket.__name__ == "copy_", f"{function} mixes devices"
        if from_mps or to_mps:
            name = function.name().removeprefix("aten::")
            self.seen.add(name)
            if not runs_on_mps(name):
                self.lacking.add(name)
        plain = tree_map(lambda leaf: leaf.on_cpu if isinstance(leaf, OnMPS) else leaf, (args, kwargs))
        out = function(*plain[0], **plain[1])
        given = {id(leaf.on_cpu): leaf for leaf in tensors if isinstance(leaf, OnMPS)}  # changed in place: itself

        def wrap(leaf):
            if not isinstance(leaf, torch.Tensor) or not to_mps:
                return leaf
            return given[id(leaf)] if id(leaf) in given else OnMPS(leaf)

        return tree_map(wrap, out)


class To(TorchFunctionMode):
    """Some functions, as torch.tensor(1.0, device="mps"), ask for the device itself, but none for "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "mps":
            if function is torch.tensor:  # which would leave the numbers behind
                return OnMPS(torch.tensor(*args, **kwargs | {"device": "cpu"}))
            kwargs["device"] = "meta"
        if function is torch.Tensor.to and str(args[1]) == "mps":
            args = (args[0], "meta", *args[2:])
        return function(*args, **kwargs)


def on_mps(model):
    """The model with its parameters and buffers there: model.to("mps") asks for the device itself."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnMPS(parameter.data))
        for name, buffer in module._buffers.items():
            module._buffers[name] = OnMPS(buffer)
    return model


KINDS = [("score", "absorb"), ("score", "uniform"), ("mean", "absorb"), ("mean", "uniform"), ("causal", "absorb")]


def model_of(kind, graph, noise="loglinear"):
    torch.manual_seed(0)
    config = sedd.SEDDConfig(7, 8, 2, 2, 8, 4, 0.1, graph, noise, kind)
    model = sedd.MODELS[kind](config)
    with MPS():
        return on_mps(model)


def tokens(value=None):
    x0 = torch.randint(7, (3, 8)) if value is None else torch.full((3, 8), value)
    return OnMPS(x0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, graph", KINDS)
def test_a_training_step_runs_on_mps(kind, graph, optimizer):
    model = model_of(kind, graph)
    with MPS() as mps, To():
        state = train.State(model, train.Options(optimizer=optimizer))
        for _ in range(2):
            (model.loss(tokens()).mean() / 8).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            state.update(1e-3, 0.99)
            model.zero_grad()
    assert not mps.lacking and {"addmm", "embedding_dense_backward"} < mps.seen


@pytest.mark.parametrize("kind, graph, noise", [*((*kind, "loglinear") for kind in KINDS),
    ("score", "absorb", "geometric"), ("score", "uniform", "geometric"), ("mean", "absorb", "geometric")])  # fmt: skip
def test_the_bound_and_each_sampler_run_on_mps(kind, graph, noise):
    model = model_of(kind, graph, noise).eval()
    prompt = torch.full((3, 8), -1)
    prompt[:, 0] = 2
    ways = [{"top_p": 0.7}] if kind == "causal" else [
        {"sampler": sampler, **how} for sampler in ("tweedie", "euler") for how in ({}, {"top_p": 0.7}, {"eta": 0.3})]
    if kind != "causal" and graph == "absorb":
        ways += [{"sampler": "exact"}, {"sampler": "exact", "top_p": 0.7}]
    with MPS() as mps, To():
        bound = model.nll(tokens(), 2)
        texts = [model.generate(OnMPS(prompt.clone()), 3, **how) for how in ways]
    assert not mps.lacking and "searchsorted.Tensor" not in mps.seen  # draws are in float64, on the CPU
    assert bound.on_cpu.isfinite().all()
    for x in texts:
        assert isinstance(x, OnMPS) and x.on_cpu.min() >= 0 and x.on_cpu.max() < 7 and (x.on_cpu[:, 0] == 2).all()


@pytest.mark.parametrize("act, lacking", [
    (lambda x: torch._fused_sdp_choice(x[None, None], x[None, None], x[None, None]), "_fused_sdp_choice"),
    (lambda x: x.frexp(), "frexp.Tensor"),
    (lambda x: torch.linalg.eigh(x[:, :3]), "_linalg_eigh"),
])  # fmt: skip
def test_what_has_no_kernel_is_seen(act, lacking):
    with MPS() as mps:
        act(OnMPS(torch.rand(3, 8)))
    assert mps.lacking == {lacking}


@pytest.mark.parametrize("name, runs", [
    ("histc", True), ("bincount", True), ("add.Tensor", True), ("add_.Tensor", True), ("exponential", True),
    ("split.Tensor", True), ("_fused_adamw_", True), ("kthvalue", True), ("_fused_sdp_choice", False),
    ("frexp.Tensor", False), ("_linalg_eigh", False),
    ("_scaled_dot_product_flash_attention_for_cpu", False), ("no_such_operation", False),
])  # fmt: skip
def test_the_list_of_kernels_is_read_as_it_is_meant(name, runs):
    assert runs_on_mps(name) is runs


@pytest.mark.parametrize("act", [
    lambda x: x.double(), lambda x: torch.zeros(3, dtype=torch.float64, device=x.device), lambda x: x + torch.ones(8)])
def test_float64_and_tensors_of_the_cpu_are_seen(act):
    with MPS(), pytest.raises((TypeError, AssertionError), match="float64|mixes devices"):
        act(OnMPS(torch.rand(3, 8)))


def test_draws_for_mps_are_in_float64_on_the_cpu():
    with MPS():
        moved = sedd.in_float64(OnMPS(torch.rand(3)))
    assert not isinstance(moved, OnMPS) and moved.dtype == torch.float64
