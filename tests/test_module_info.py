"""PyTorch's own module tests (``test/test_modules.py``), on the CSQ and packed layers in every stage.

The sizes, inputs and reference functions are those of ``module_db``, by which PyTorch tests the float layers. What does
not apply: ``test_gradgrad`` and ``test_check_inplace``, for the reasons that the tests of these names show;
``test_gpu_parity`` and ``test_multiple_device_transfer`` need other devices than most machines have.
"""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from helpers import FLOAT16, FLOAT32, FLOAT64, assert_within
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.nn.layers import CSQ_CLASSES
from csq_kernels.nn.packed import PACKED_CLASSES

pytest.importorskip("expecttest")  # which PyTorch's own tests need
# It would forbid every change of torch.backends' flags for the rest of the session.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
    from torch.testing._internal.common_utils import noncontiguous_like

INFOS = {info.module_cls: info for info in module_db if info.module_cls in CSQ_CLASSES}
# single-pass: the mode of csq_kernels.optim, where the weight is a leaf.
STAGES = ("search", "single-pass", "finetune", "hard", "packed")
SOFT = ("search", "single-pass", "finetune")
N_BITS = 4


def class_of(info: ModuleInfo, stage: str) -> type[nn.Module]:
    return (PACKED_CLASSES if stage == "packed" else CSQ_CLASSES)[info.module_cls]


def advance(layer: nn.Module, stage: str) -> nn.Module:
    """Bring a new CSQ layer into a stage."""
    if stage == "single-pass":
        layer.make_weight_leaf_()
    elif stage == "finetune":
        layer.fix_scheme_((1, 2, 3), drop_planes=True)
    elif stage != "search":
        layer.harden_()
    if stage == "packed":
        csq.pack_(nn.Sequential(layer))
    return layer


def make(info: ModuleInfo, stage: str, sample: ModuleInput, dtype: torch.dtype = FLOAT32) -> nn.Module:
    """The layer of a sample; one in another dtype than float32 was cast to it."""
    constructor = sample.constructor_input
    layer = CSQ_CLASSES[info.module_cls](*constructor.args, **constructor.kwargs, n_bits=N_BITS)
    return advance(layer, stage).to(dtype)


def twin(info: ModuleInfo, sample: ModuleInput, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The float layer with the weight that ``layer`` has now."""
    constructor = sample.constructor_input
    float_layer = info.module_cls(*constructor.args, **constructor.kwargs, dtype=dtype)
    with torch.no_grad():
        float_layer.weight.copy_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            float_layer.bias.copy_(layer.bias)
    return float_layer


def samples(info: ModuleInfo, dtype: torch.dtype = FLOAT32, requires_grad: bool = False) -> list[ModuleInput]:
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=True)


def arguments_of(sample: ModuleInput) -> tuple[Tensor]:
    """The input; ``module_db`` passes some by name."""
    return (*sample.forward_input.args, *sample.forward_input.kwargs.values())


def float_tensors(layer: nn.Module) -> dict[str, Tensor]:
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


@pytest.fixture(params=INFOS, ids=lambda cls: cls.__name__)
def info(request: pytest.FixtureRequest) -> ModuleInfo:
    return INFOS[request.param]


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


def test_module_db_has_every_layer() -> None:
    assert INFOS.keys() == CSQ_CLASSES.keys() == PACKED_CLASSES.keys()


def test_forward(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        output = layer(*sample.forward_input.args, **sample.forward_input.kwargs)
        float_layer = twin(info, sample, layer, FLOAT32)
        expected = float_layer(*inputs)
        if stage == "packed":
            wide = twin(info, sample, layer, FLOAT64)
            exact = wide(*(t.double() if t.is_floating_point() else t for t in inputs))
            assert_within(output.detach(), exact.detach(), expected.detach())
        else:
            assert torch.equal(output, expected)
        if sample.reference_fn is not None:
            torch.testing.assert_close(output, sample.reference_fn(float_layer, *inputs))
        layer.eval()
        assert torch.equal(layer(*inputs), output), "train and eval mode differ"


@pytest.mark.parametrize("cls", [cls for cls, info in INFOS.items() if info.module_error_inputs_func is not None])
def test_errors(cls: type[nn.Module], stage: str) -> None:
    info = INFOS[cls]
    options = {"device": "cpu", "dtype": FLOAT32, "requires_grad": False, "training": True}
    for error in info.module_error_inputs_func(info, **options):
        sample = error.module_error_input
        # A packed embedding gathers bytes of planes, by another function of PyTorch with words of its own.
        with pytest.raises(error.error_type, match=None if stage == "packed" else error.error_regex):
            make(info, stage, sample)(*arguments_of(sample))


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT16], ids=str)
def test_factory_kwargs(info: ModuleInfo, stage: str, dtype: torch.dtype) -> None:
    """As the keywords ask, by a default dtype or device, and by a cast: the same shapes, dtypes and devices."""
    constructor, cls = samples(info)[0].constructor_input, class_of(info, stage)

    def build(**factory) -> dict[str, tuple]:
        layer = cls(*constructor.args, **constructor.kwargs, **factory)
        layer = layer if stage == "packed" else advance(layer, stage)
        tensors = (*layer.named_parameters(), *layer.named_buffers())
        # On each device planes lie in the order that its kernels read.
        return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors if name != "planes"}

    asked = build(dtype=dtype)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert build() == asked
    finally:
        torch.set_default_dtype(default)
    cast = cls(*constructor.args, **constructor.kwargs)
    cast = (cast if stage == "packed" else advance(cast, stage)).to(dtype)
    assert {name: dtype for name, (_, dtype, _) in asked.items()} == {
        name: tensor.dtype for name, tensor in (*cast.named_parameters(), *cast.named_buffers()) if name != "planes"
    }
    if stage != "finetune" and stage != "hard":  # these encode values, and meta tensors have none
        meta = build(dtype=dtype, device="meta")
        with torch.device("meta"):
            assert build(dtype=dtype) == meta
        assert meta == {name: (*shape_and_dtype, "meta") for name, (*shape_and_dtype, _) in asked.items()}
        skipped = torch.nn.utils.skip_init(cls, *constructor.args, **constructor.kwargs, dtype=dtype)
        assert not any(tensor.is_meta for tensor in skipped.state_dict().values())


def test_repr(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info):
        shown = repr(make(info, stage, sample))
        assert shown.startswith(class_of(info, stage).__name__ + "(")
        options = repr(info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs))
        assert options.partition("(")[2][:-1] in shown, "an option of the float layer is missing"


def test_save_load_pickle_and_deepcopy(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        expected = layer(*inputs)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = {
            "torch.load": torch.load(file, weights_only=False),
            "pickle": pickle.loads(pickle.dumps(layer)),
            "deepcopy": copy.deepcopy(layer),
        }
        state = io.BytesIO()
        torch.save(layer.state_dict(), state)
        state.seek(0)
        loaded = make(info, stage, sample)
        loaded.load_state_dict(torch.load(state, weights_only=True), strict=True)
        for name, twin_layer in (copies | {"load_state_dict": loaded}).items():
            assert torch.equal(twin_layer(*inputs), expected), name
            assert repr(twin_layer) == repr(layer), name
            held = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
            assert not held & {id(tensor) for tensor in (*twin_layer.parameters(), *twin_layer.buffers())}, name


def gradients(layer: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    """Of the input and of everything that can be trained, single-pass state too."""
    wanted = [tensor for tensor in (*inputs, *layer.parameters()) if tensor.requires_grad]
    return [*torch.autograd.grad(layer(*inputs), wanted, grad, allow_unused=True)] if wanted else []


def test_non_contiguous_tensors(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info, requires_grad=True):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        output = layer(*inputs)
        grad = torch.randn_like(output)
        expected = gradients(layer, inputs, grad)
        scattered = tuple(noncontiguous_like(tensor) for tensor in inputs)
        for inputs_used in (inputs, scattered):
            for grad_used in (grad, noncontiguous_like(grad)):
                torch.testing.assert_close(layer(*inputs_used), output)
                for mine, first in zip(gradients(layer, inputs_used, grad_used), expected, strict=True):
                    torch.testing.assert_close(mine, first)
        for parameter in layer.parameters():
            parameter.data = noncontiguous_like(parameter.data)
        torch.testing.assert_close(layer(*scattered), output)
        for mine, first in zip(gradients(layer, scattered, noncontiguous_like(grad)), expected, strict=True):
            torch.testing.assert_close(mine, first)


def call(layer: nn.Module, inputs: tuple[Tensor, ...], *_: Tensor) -> Tensor:
    """What ``gradcheck`` calls: it changes the tensors that it varies in place."""
    return layer(*inputs)


def test_grad(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info, FLOAT64, requires_grad=True):
        layer, inputs = make(info, stage, sample, FLOAT64), arguments_of(sample)
        parameters = [p for p in layer.parameters() if p.requires_grad and p.numel()]
        if stage == "packed":
            # The kernels take the bias in float32, where no difference quotient of float64 can be formed.
            parameters = []
        wanted = [tensor for tensor in inputs if tensor.requires_grad] + parameters
        if wanted:
            assert torch.autograd.gradcheck(functools.partial(call, layer, inputs), tuple(wanted), fast_mode=True)


@pytest.mark.parametrize("stage", ["search", "finetune", "packed"])
def test_gradgrad(info: ModuleInfo, stage: str) -> None:
    """There are first derivatives only: a second one is refused, not wrong."""
    sample = samples(info, FLOAT64, requires_grad=True)[0]
    layer, inputs = make(info, stage, sample, FLOAT64), arguments_of(sample)
    wanted = inputs if stage == "packed" else (layer.bit_logits,)
    if not wanted[0].requires_grad:
        pytest.skip("the input of a packed embedding are indices")
    first = torch.autograd.grad(layer(*inputs).square().sum(), wanted, create_graph=True)
    if stage == "packed" and isinstance(layer, (csq.PackedConv3d, csq.PackedConvTranspose2d)):
        assert first[0].requires_grad  # PyTorch's own convolution with a decoded weight
        return
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_check_inplace(info: ModuleInfo, stage: str) -> None:
    """No layer has an option for it, and none writes to its input."""
    assert "inplace" not in inspect.signature(class_of(info, stage)).parameters
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        versions = [tensor._version for tensor in inputs]
        layer(*inputs)
        assert [tensor._version for tensor in inputs] == versions


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda layer: layer.double(),
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "to": lambda layer: layer.to(dtype=FLOAT16),
    "type": lambda layer: layer.type(FLOAT16),
}


@pytest.mark.parametrize("swap", [False, True], ids=["set_data", "swap"])
@pytest.mark.parametrize("cast", CASTS)
def test_to(info: ModuleInfo, stage: str, cast: str, swap: bool) -> None:
    """After a cast, with gradients in place, the layer is in the new dtype, what has to be wide is wide, and it runs
    forward and backward; parameters stay the same objects.
    """
    sample = samples(info)[0]
    layer = make(info, stage, sample)
    weight, identities = layer.weight.detach().clone(), [id(parameter) for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    shared = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        CASTS[cast](layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(shared)
    assert [id(parameter) for parameter in layer.parameters()] == identities
    dtype = layer.dtype
    assert dtype == {"double": FLOAT64, "bfloat16": torch.bfloat16}.get(cast, FLOAT16)
    wide = {"gate_logits", "scale", "temperature"} if stage != "packed" else set()
    for name, tensor in float_tensors(layer).items():
        if name in wide:
            assert tensor.dtype == torch.promote_types(dtype, FLOAT32), name
        elif not (stage == "packed" and name in ("scale", "step")):
            assert tensor.dtype == dtype, name
        assert tensor.grad is None or tensor.grad.dtype == tensor.dtype, name
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight.float(), weight, rtol=0.05, atol=0.05)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in arguments_of(sample))
    output = layer(*inputs)
    assert output.dtype == dtype
    if output.requires_grad:
        output.sum().backward()
    codes = getattr(layer, "codes", None)
    assert codes is None or codes.dtype == torch.int16


def test_to_empty_and_meta(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        state, expected = copy.deepcopy(layer.state_dict()), layer(*inputs)
        with torch.no_grad():
            layer.to("meta")
            assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
            shapes = layer(*(tensor.to("meta") for tensor in inputs))
            assert shapes.is_meta and (shapes.shape, shapes.dtype) == (expected.shape, expected.dtype)
        layer.to_empty(device="cpu").load_state_dict(state)
        assert torch.equal(layer(*inputs), expected)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def test_memory_format(info: ModuleInfo, stage: str) -> None:
    """Both the layer and its input may be in either format, and planes stay as they are. Images that come channels last
    leave so, as from the float layer; but the kernels on packed planes answer in PyTorch's default format.

    A whole model is converted at once: also layers that hold no images have to bear the call.
    """
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        float_layer = twin(info, sample, layer, FLOAT32)
        expected = layer(*inputs)
        image_format = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
        layer.to(memory_format=image_format)
        float_layer.to(memory_format=image_format)
        own = getattr(layer, "bit_logits", None)
        assert own is None or own.is_contiguous()
        torch.testing.assert_close(layer(*inputs), expected)
        if inputs[0].ndim in FORMATS and info.module_memformat_affects_out:
            image = inputs[0].to(memory_format=FORMATS[inputs[0].ndim])
            output = layer(image)
            torch.testing.assert_close(output, expected)
            on_planes = isinstance(layer, (csq.PackedConv1d, csq.PackedConv2d))
            assert output.is_contiguous() if on_planes else output.stride() == float_layer(image).stride()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks(info: ModuleInfo, stage: str) -> None:
    """Every kind of hook is called once, in the order and with the gradients of the float layer, and may replace what
    it is given.
    """

    def watch(layer: nn.Module) -> list[tuple[str, list[Tensor]]]:
        seen: list[tuple[str, list[Tensor]]] = []

        def note(name: str):
            def hook(module: nn.Module, *tensors) -> None:
                assert module is layer
                flat = [t for entry in tensors for t in (entry if isinstance(entry, tuple) else (entry,))]
                seen.append((name, [t.detach().clone() for t in flat if isinstance(t, Tensor)]))

            return hook

        layer.register_forward_pre_hook(note("forward_pre"))
        layer.register_forward_hook(note("forward"))
        layer.register_full_backward_pre_hook(note("full_backward_pre"))
        layer.register_full_backward_hook(note("full_backward"))
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        return seen

    for sample in samples(info, requires_grad=True):
        layer = make(info, stage, sample)
        float_layer = twin(info, sample, layer, FLOAT32)
        outputs, seen = [], []
        for module in (layer, float_layer):
            seen.append(watch(module))
            outputs.append(module(*arguments_of(sample)))
            if outputs[-1].requires_grad:
                outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs)
        if not outputs[0].requires_grad:  # a table that is not trained has no backward pass
            assert info.module_cls is nn.Embedding
            seen[1] = [entry for entry in seen[1] if "backward" not in entry[0]]
        assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
        for (name, mine), (_, theirs) in zip(*seen, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_state_dict_hooks(info: ModuleInfo, stage: str) -> None:
    layer, called = make(info, stage, samples(info)[0]), []
    layer.register_state_dict_pre_hook(lambda *_: called.append("save_pre"))
    layer.register_state_dict_post_hook(lambda *_: called.append("save"))
    layer.register_load_state_dict_pre_hook(lambda *_: called.append("load_pre"))
    layer.register_load_state_dict_post_hook(lambda *_: called.append("load"))
    layer.load_state_dict(layer.state_dict())
    assert called == ["save_pre", "save", "load_pre", "load"]


@pytest.mark.gpu
def test_gpu_parity(info: ModuleInfo, stage: str) -> None:
    for sample in samples(info, requires_grad=True):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        expected = layer(*inputs)
        moved = copy.deepcopy(layer).cuda()
        away = tuple(tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in inputs)
        output = moved(*away)
        torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(expected)
        for mine, theirs in zip(gradients(moved, away, grad.cuda()), gradients(layer, inputs, grad), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4)
        assert torch.equal(moved.cpu().weight, layer.weight)


@pytest.mark.gpu
def test_multiple_device_transfer(info: ModuleInfo, stage: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, and torch sees one")
    for sample in samples(info):
        layer, inputs = make(info, stage, sample), arguments_of(sample)
        outputs = [layer.to(device)(*(t.to(device) for t in inputs)).cpu() for device in ("cuda:0", "cuda:1")]
        torch.testing.assert_close(*outputs)
