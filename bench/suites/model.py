"""Whole networks: training steps against PyTorch on the reference, inference against float and PyTorch's int8."""

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo.config
from accuracy import Norms, Verdict, twice
from harness import Case, integers, interleave, names, peak_bytes, present, report_caught, without
from peers.csq import PRECISIONS, rounded_to_int8
from peers.pytorch import prepack
from torch import Tensor, nn
from trust import Entry

import csq_kernels as csq
from csq_kernels import reference
from csq_kernels.nn.pack import summary
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.train import models

# A compiled function has a version for each shape of a layer, with and without gradients: more than a few.
torch._dynamo.config.recompile_limit = 256
TRAIN = ("float", "reference", "reference-compiled", "separate", "single-pass")
INFER = ("float", "torch dynamic int8", *(f"csq {precision}" for precision in PRECISIONS))
MODES = {"infer": INFER, "train": TRAIN}
OURS = ("separate", "single-pass", *INFER[2:])
TRAINED_BITS, PACKED_BITS = 8, 3  # n of equation (3); 3 are stored as up to 4
RATE, MOMENTUM = 1e-3, 0.9
CHECKED_STEPS = 2  # the second one needs the momenta of the first
# Inputs of a step, and of a pass.
TRAIN_BATCH = {"mlp": 128, "transformer": 4, "resnet20": 32}


def mlp() -> nn.Module:
    """784 inputs, two hidden layers of 1024 units."""
    return models.build("mlp", 1, 28, 10, width=1024, depth=2)


def transformer() -> nn.Module:
    """6 blocks of width 384 with 6 heads."""
    return nn.Sequential(*(models.TransformerBlock(384, 6) for _ in range(6)))


def resnet20() -> nn.Module:
    """The network for CIFAR."""
    return models.build("resnet20", 3, 32, 10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (1, 28, 28)),
    "transformer": (transformer, (128, 384)),
    "resnet20": (resnet20, (3, 32, 32)),
}


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


class Training:
    """A network, an optimizer, an input, and how the weights of the layers are computed if not by themselves."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        forward: Callable[[Tensor], Tensor] | None = None,
        weights: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self.optimizer, self.x = optimizer, x
        self.forward = forward or network
        self.weights = torch.no_grad()(weights or (lambda: [layer.weight for layer in layers_of(network).values()]))

    def step(self) -> Tensor:
        loss = loss_of(self.forward(self.x))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def entry(self) -> Entry:
        return Entry(self.step, self.optimizer.zero_grad, (self.x,), lambda loss: [loss, *self.weights()])


def layers_of(network: nn.Module) -> Mapping[str, nn.Module]:
    """The CSQ layers, or the float layers that would become such."""
    found = csq_layers(network)
    return found or {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def on_the_reference(prepared: nn.Module, float_network: nn.Module, x: Tensor, reconstruct: Callable) -> Training:
    """``prepared`` as plain PyTorch trains it: each weight by equation (3), autograd, ``torch.optim``."""
    layers = csq_layers(prepared)
    # All else is the float network's own, and is trained as well.
    rest = {
        name: parameter
        for name, parameter in prepared.named_parameters()
        if not name.endswith(("bit_logits", "gate_logits", "scale"))
    }

    def weights() -> dict[str, Tensor]:
        return {
            f"{name}.weight": reconstruct(
                layer.bit_logits,
                layer.gate_logits,
                layer.scale,
                layer.temperature,
                list(layer.bits),
                layer.n_bits,
                layer.channel_axis,
                False,
            )
            for name, layer in layers.items()
        }

    def forward(x: Tensor) -> Tensor:
        return torch.func.functional_call(float_network, weights() | rest, (x,))

    optimizer = torch.optim.SGD(csq.param_groups(prepared, lr=RATE), lr=RATE, momentum=MOMENTUM, foreach=True)
    return Training(prepared, optimizer, x, forward, lambda: list(weights().values()))


def training(provider: str, float_network: nn.Module, prepared: nn.Module, x: Tensor) -> Training:
    """A provider before its first step."""
    float_network, prepared = copy.deepcopy(float_network).train(), copy.deepcopy(prepared).train()
    if provider == "float":
        stock = torch.optim.SGD(float_network.parameters(), lr=RATE, momentum=MOMENTUM, fused=True)
        return Training(float_network, stock, x)
    if provider == "single-pass":
        return Training(prepared, csq.optim.SGD(prepared, lr=RATE, momentum=MOMENTUM), x)
    if provider == "separate":
        groups = csq.param_groups(prepared, lr=RATE)
        return Training(prepared, torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, fused=True), x)
    compiled = provider == "reference-compiled"
    # A weight at a time: the network around it runs as eagerly as it does for the others.
    make = torch.compile(reference.reconstruct, fullgraph=True, dynamic=False) if compiled else reference.reconstruct
    return on_the_reference(prepared, float_network, x, make)


def errors_of(found: list[Tensor], exact: list[Tensor]) -> Norms:
    norms = Norms()
    for mine, theirs in zip(found, exact, strict=True):
        norms.add(mine.double() - theirs)
    return norms


def judged_training(
    providers: list[str], float_network: nn.Module, prepared: nn.Module, x: Tensor
) -> tuple[dict[str, Training], dict[str, Verdict]]:
    """Every provider after ``CHECKED_STEPS`` steps, and how far its weights are from those of float64 steps."""
    exact = on_the_reference(
        copy.deepcopy(prepared).double().train(),
        copy.deepcopy(float_network).double().train(),
        x.double(),
        reference.reconstruct,
    )
    made = {name: training(name, float_network, prepared, x) for name in dict.fromkeys(["reference", *providers])}
    for each in (exact, *made.values()):
        for _ in range(CHECKED_STEPS):
            each.optimizer.zero_grad()
            each.step()
        each.optimizer.zero_grad()
    weights = exact.weights()
    size = errors_of([torch.zeros_like(weight) for weight in weights], weights)
    errors = {name: errors_of(each.weights(), weights) for name, each in made.items() if name != "float"}
    verdicts = {name: twice("the weights", found, errors["reference"], size) for name, found in errors.items()}
    return {name: made[name] for name in providers}, verdicts


class DynamicLinear(nn.Module):
    """PyTorch's int8 layer with the weight of a float one rounded to 8 bits a row, its input at each call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scales = layer.weight.detach().abs().amax(1).clamp(min=1e-12) / 127
        codes = (layer.weight.detach() / scales[:, None]).round().to(torch.int8)
        self.packed = prepack(codes, scales, None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, True)


def dynamic(network: nn.Module) -> nn.Module:
    """A copy of ``network`` with every linear layer in int8."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, DynamicLinear(layer))
    return network


def is_linear(network: nn.Module) -> bool:
    """Whether most weights are those of linear layers."""
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    return 2 * linear > sum(p.numel() for p in network.parameters())


def with_rounded_inputs(network: nn.Module) -> nn.Module:
    """A copy in float64 whose layers read their input in 8 bits, but for those that are always exact."""
    network = copy.deepcopy(network).double()
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args: (rounded_to_int8(args[0]),))
        elif isinstance(layer, nn.Conv2d) and not reference.always_exact(layer.weight.shape, layer.groups):
            # One step a sample.
            layer.register_forward_pre_hook(
                lambda _, args: (rounded_to_int8(args[0].flatten(1), args[0][0].numel()).view(args[0].shape),)
            )
    return network


# Over the error of inputs in 8 bits: tables limit sums of four inputs, which costs some; 16 bits are 256 times finer.
ALLOWED = {"int8": 2.0, "high": 2.0 / 64}


def packed_networks(float_network: nn.Module, prepared: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The float network of the packed weights, and the packed one in each precision."""
    packed = copy.deepcopy(prepared).eval()
    csq.finalize_(packed)
    csq.pack_(packed)
    unpacked = copy.deepcopy(packed)
    csq.unpack_(unpacked)
    networks = {}
    for precision in PRECISIONS:
        networks[precision] = copy.deepcopy(packed)
        csq.set_precision_(networks[precision], precision)
    return unpacked, networks


@torch.inference_mode()
def judged_inference(
    providers: list[str], float_network: nn.Module, prepared: nn.Module, x: Tensor
) -> tuple[dict[str, nn.Module], dict[str, Verdict]]:
    """Every network, and how far the outputs of ours are from those in float64."""
    unpacked, networks = packed_networks(float_network, prepared)
    exact = copy.deepcopy(unpacked).double()(x.double())
    rounded = float((with_rounded_inputs(unpacked)(x.double()) - exact).norm() / exact.norm())
    plain = Norms().add(unpacked(x).double() - exact)
    made: dict[str, nn.Module] = {}
    verdicts = {}
    for name in providers:
        precision = name.removeprefix("csq ")
        if name == "float":
            made[name] = unpacked
        elif name == "torch dynamic int8":
            made[name] = dynamic(unpacked)
        else:
            made[name] = networks[precision]
            found = made[name](x).double() - exact
            if precision == "exact":
                verdicts[name] = twice("the output", Norms().add(found), plain, Norms().add(exact))
            else:
                error, allowed = float(found.norm() / exact.norm()), ALLOWED[precision] * rounded
                text = f"relative error of the output {error:.2e}, allowed {allowed:.2e}"
                verdicts[name] = Verdict(error / allowed, text)
    return made, verdicts


def measure(
    name: str, mode: str, batch: int, threads: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], bool]:
    """Check, then time one network; return its rows, and whether everything was right."""
    torch._dynamo.reset()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    n_bits = TRAINED_BITS if mode == "train" else PACKED_BITS
    float_network = build().to(options.device)
    prepared = copy.deepcopy(float_network)
    csq.prepare_(prepared, csq.Config(n_bits=n_bits))
    x = torch.randn(batch, *shape, device=options.device)
    providers = [p for p in MODES[mode] if p in options.providers]
    if mode == "train":
        made, verdicts = judged_training(providers, float_network, prepared, x)
        entries, stored = {provider: each.entry() for provider, each in made.items()}, {}
        yardsticks = {"reference-compiled": "reference", "separate": "reference", "single-pass": "reference"}
    else:
        if "torch dynamic int8" in providers and (options.device != "cpu" or not is_linear(float_network)):
            reason = "it is for processors" if options.device != "cpu" else "its convolutions have no dynamic int8"
            without(f"torch dynamic int8, {name}", reason)
            providers.remove("torch dynamic int8")
        made, verdicts = judged_inference(providers, float_network, prepared, x)
        entries = {provider: Entry(inference(network, x), inputs=(x,)) for provider, network in made.items()}
        stored = {p: summary(made[p]).average("stored_bits") for p in providers if p.startswith("csq")}
        yardsticks = dict.fromkeys(providers, "float")
    # A baseline may err more than allowed and still be the one to beat; ours may not.
    red = {provider: v.where for provider, v in verdicts.items() if provider in OURS and not v.error <= 1}
    entries = {provider: entry for provider, entry in entries.items() if provider not in red}
    peaks = {provider: peak_bytes(entry, options.device) for provider, entry in entries.items()}
    timing = interleave(entries, options.rounds, options.device, lambda provider: yardsticks.get(provider))
    report_caught(red | timing.caught, f"{name} {mode}")
    rows = [
        {
            "op": "model",
            "provider": provider,
            "mode": mode,
            "network": name,
            "shape": list(x.shape),
            "dtype": "float32",
            "n_bits": n_bits,
            "batch": batch,
            "threads": threads,
            "device": options.device,
            "rounds": options.rounds,
            "weights": sum(parameter.numel() for parameter in float_network.parameters()),
            "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "copy_bytes_per_second": timing.bandwidth,
            "speedup_over": {
                other: timing.spreads[other].median / spread.median
                for other in timing.spreads
                if other != provider and other not in OURS
            },
            "stored_bits": stored.get(provider),
            "peak_bytes": peaks[provider],
            "error_over_allowed": verdicts[provider].error if provider in verdicts else None,
        }
        for provider, spread in timing.spreads.items()
    ]
    return rows, not red and not timing.caught


def inference(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return network(x)

    return run


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each provider."""
    first = rows[0]
    print(f"\n{first['network']} {first['mode']}, batch {first['batch']}, {first['threads']} threads")
    columns = "{:20} {:>12} {:>21} {:>11} {:>6}  {}"
    print(columns.format("provider", "median", "p20..p80", "peak", "error", "times faster than"))
    for row in rows:
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        error = row["error_over_allowed"]
        print(
            columns.format(
                row["provider"],
                f"{ms['median']:.3f} ms",
                f"{ms['p20']:.3f}..{ms['p80']:.3f}",
                f"{row['peak_bytes'] / 1e6:.2f} MB",
                "" if error is None else f"{error:.2f}",
                ", ".join(f"{other} {ratio:.2f}x" for other, ratio in row["speedup_over"].items()),
            )
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--networks", type=names, default=",".join(NETWORKS))
    parser.add_argument("--modes", type=names, default=",".join(MODES))
    parser.add_argument("--providers", type=names, default=",".join(dict.fromkeys([*INFER, *TRAIN])))
    parser.add_argument("--batch", type=int, default=1, help="of inference; a training step takes 4 to 128 samples")
    parser.add_argument("--threads", type=integers, default=str(torch.get_num_threads()))
    parser.add_argument("--rounds", type=int, default=5)


def weights_of(name: str) -> int:
    """Parameters of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name][0]().parameters())


def cases(options: argparse.Namespace) -> list[Case]:
    """One for each mode, network and number of threads, the cheapest first."""
    if unknown := set(options.networks) - set(NETWORKS):
        raise ValueError(f"expected --networks of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    options.providers = present(options.providers, options.device)
    found = []
    for mode, name, threads in itertools.product(options.modes, options.networks, options.threads):
        batch = TRAIN_BATCH[name] if mode == "train" else options.batch
        cost = weights_of(name) * (100 if mode == "train" else 1)
        run = functools.partial(measure, name, mode, batch, threads, options)
        found.append(Case(f"{name} {mode}, {threads} threads", cost, run))
    return sorted(found, key=lambda case: case.cost)
