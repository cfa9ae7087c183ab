"""The activation that carries alpha, on its own. References are in float64 or are the native modules themselves."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from hf_layercollapse import CollapsibleActivation
from hf_layercollapse.modeling_layercollapse import collapsible


WIDTH = 12
# (gate, linear_target, granularity)
KINDS = [
    pytest.param(gate, target, granularity, id=f"{'gate' if gate else 'plain'}-{target}-{granularity}")
    for gate in (False, True)
    for target in ("identity", "affine")
    for granularity in ("block", "neuron")
]
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh", "leaky_relu"]


def activation(act="gelu", width=WIDTH, alpha=None, gate=False, target="identity", granularity="block"):
    module = CollapsibleActivation(ACT2FN[act], width, linear_target=target, granularity=granularity, gate=gate)
    with torch.no_grad():
        if alpha is not None:
            module.alpha.fill_(alpha)
        elif granularity == "neuron":
            module.alpha.copy_(torch.rand(width))
        else:
            module.alpha.fill_(0.3)
        for buffer in module.buffers():
            buffer.copy_(torch.randn(width))
    return module


def pre_activations(*shape, dtype=torch.float32, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(*(shape or (4, 5, WIDTH)), generator=generator)
    return values.to(dtype).requires_grad_(requires_grad)


def reference(module, z):
    """DESIGN's formula, in float64."""
    alpha = module.alpha.detach().double()
    if module.linear_target == "affine":
        slope, offset = (0.0 if module.gate else module.slope.double()), module.offset.double()
    else:
        slope, offset = (0.0, 1.0) if module.gate else (1.0, 0.0)
    z = z.detach().double()
    return (1 - alpha) * module.act(z) + alpha * (slope * z + offset)


def gradients(module, z, grad):
    z = z.detach().clone().requires_grad_()
    output = module(z)
    parameters = list(module.parameters())
    return output, torch.autograd.grad(output, [z, *parameters], grad)


# ----------------------------------------------------------------------------------------------------
# What it computes
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_computes_the_formula(gate, target, granularity, grad):
    module = activation(gate=gate, target=target, granularity=granularity)
    z = pre_activations(requires_grad=grad)
    expected = reference(module, z)
    with torch.set_grad_enabled(grad):
        actual = module(z)
    # The formula itself, in float32, is the plain computation.
    alpha = module.alpha.detach()
    slope, offset = module.line
    plain = (1 - alpha) * module.act(z.detach()) + alpha * (slope * z.detach() + offset)
    bound = 2 * (plain.double() - expected).abs().max()
    assert (actual.detach().double() - expected).abs().max() <= bound
    assert actual.requires_grad == grad


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_gradients_are_those_of_the_formula(gate, target, granularity):
    module = activation(gate=gate, target=target, granularity=granularity)
    z = pre_activations(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    alpha = module.alpha.detach().double().requires_grad_()
    buffers = {name: buffer.double() for name, buffer in module.named_buffers()}

    def run(z, alpha):
        return torch.func.functional_call(module, {"alpha": alpha, **buffers}, (z,))

    assert torch.autograd.gradcheck(run, (z, alpha))


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_function_transforms(gate, target, granularity):
    """`torch.func` gives what autograd gives."""
    module = activation(gate=gate, target=target, granularity=granularity)
    z, tangent = pre_activations(4, WIDTH), pre_activations(4, WIDTH, seed=1)
    state = dict(module.named_parameters())

    def run(state, z):
        return torch.func.functional_call(module, state, (z,))

    def plain(z):
        slope, offset = module.line
        return collapsible(z, module.act(z), module.alpha, slope, offset)

    expected = torch.autograd.functional.jacobian(plain, z)
    torch.testing.assert_close(torch.func.jacrev(run, argnums=1)(state, z), expected)
    output, along = torch.func.jvp(lambda z: run(state, z), (z,), (tangent,))
    assert torch.equal(output, module(z))
    torch.testing.assert_close(along, (expected * tangent).sum((-2, -1)))
    of_rows = torch.func.vmap(torch.func.grad(lambda state, z: run(state, z).sum()), in_dims=(None, 0))(state, z)
    for row, found in zip(z, of_rows["alpha"], strict=True):
        torch.testing.assert_close(found, gradients(module, row, torch.ones(WIDTH))[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_alpha_zero_is_the_native_activation_bit_for_bit(act, dtype):
    module = activation(act, alpha=0.0)
    # Very small, very large (where the native activation does not overflow), and ordinary ones.
    large = 30.0 if dtype == torch.float16 else 1e4
    extremes = torch.tensor([torch.finfo(dtype).tiny, 1e-4, 1.0, 20.0, large], dtype=dtype)
    z = torch.cat([pre_activations(100, WIDTH, dtype=dtype).flatten(), extremes, -extremes, torch.zeros(2)]).to(dtype)
    z = z.reshape(-1, WIDTH)
    grad = pre_activations(*z.shape, dtype=dtype, seed=1)
    native_z = z.clone().requires_grad_()
    native = ACT2FN[act](native_z)
    (native_grad,) = torch.autograd.grad(native, native_z, grad)

    output, (grad_z, grad_alpha) = gradients(module, z, grad)
    with torch.no_grad():
        assert torch.equal(module(z), native)
    assert torch.equal(output, native) and output.dtype == dtype
    assert torch.equal(grad_z, native_grad)
    assert torch.isfinite(grad_alpha).all() and grad_alpha.dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3, 1.0])
def test_relu_with_the_identity_target_is_prelu_number_for_number(alpha):
    module, prelu = activation("relu", alpha=alpha), nn.PReLU(1, init=alpha)
    z, grad = pre_activations(64, WIDTH), pre_activations(64, WIDTH, seed=1)
    z[0] = 0.0
    output, (grad_z, grad_alpha) = gradients(module, z, grad)
    expected, (expected_z, expected_alpha) = gradients(prelu, z, grad)
    with torch.no_grad():
        assert torch.equal(module(z), expected)
    assert torch.equal(output, expected)
    assert torch.equal(grad_z, expected_z)
    # A sum over all elements: the order of summation is free, the error of PReLU's own is not to be exceeded by much.
    exact = (grad.double() * z.double().clamp_max(0)).sum()
    absolute = (grad.double() * z.double().clamp_max(0)).abs().sum()
    assert (grad_alpha.double() - exact).abs() <= 2 * max(
        (expected_alpha.double() - exact).abs(), torch.finfo(torch.float32).eps * absolute
    )


@pytest.mark.parametrize("target", ["identity", "affine"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
def test_alpha_one_is_the_line(gate, target):
    module = activation(alpha=1.0, gate=gate, target=target)
    z = pre_activations()
    slope, offset = module.line
    torch.testing.assert_close(module(z), slope * z + offset + torch.zeros_like(z), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("granularity", ["block", "neuron"])
def test_the_gradient_of_alpha_is_summed_in_float32(granularity):
    module = activation(alpha=0.5, granularity=granularity)
    z = pre_activations(4096, WIDTH, dtype=torch.bfloat16)
    grad = torch.ones_like(z)
    _, (grad_z, grad_alpha) = gradients(module, z, grad)
    difference = z.double() - module.act(z).double()
    exact = difference.sum() if granularity == "block" else difference.sum(0)
    assert grad_z.dtype == torch.bfloat16
    torch.testing.assert_close(grad_alpha.double(), exact.expand_as(grad_alpha), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_shapes_strides_and_empty_inputs(gate, target, granularity):
    module = activation(gate=gate, target=target, granularity=granularity)
    z = pre_activations(3, WIDTH)
    expected = gradients(module, z, torch.ones_like(z))
    strided = torch.stack([z, z + 1], dim=-1)[..., 0].T.contiguous().T
    assert not strided.is_contiguous()
    actual = gradients(module, strided, torch.ones_like(z))
    torch.testing.assert_close(actual, expected)
    one = [gradients(module, row, torch.ones(WIDTH)) for row in z]
    torch.testing.assert_close(torch.stack([output for output, _ in one]), expected[0])
    torch.testing.assert_close(sum(grads[1] for _, grads in one), expected[1][1])
    output, grads = gradients(module, z[:0], torch.ones(0, WIDTH))
    assert output.shape == (0, WIDTH) and torch.equal(grads[1], torch.zeros_like(grads[1]))


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_a_million_elements(gate, target, granularity, dtype):
    """More than a cache holds: worked on in chunks, of which the last is smaller."""
    width = 1000
    module = activation(gate=gate, target=target, granularity=granularity, width=width)
    z, grad = pre_activations(1001, width, dtype=dtype), pre_activations(1001, width, dtype=dtype, seed=1)
    output, (grad_z, grad_alpha) = gradients(module, z, grad)
    rows = [gradients(module, part, part_grad) for part, part_grad in zip(z.split(77), grad.split(77), strict=True)]
    assert torch.equal(output, torch.cat([part for part, _ in rows]))
    assert torch.equal(grad_z, torch.cat([grads[0] for _, grads in rows]))
    # Sums of a million terms, in another order.
    expected = sum(grads[1].double() for _, grads in rows)
    scale = (grad.double() * z.double()).abs().sum(None if granularity == "block" else 0)
    assert ((grad_alpha - expected).abs() <= 1e-5 * scale).all()
    with torch.no_grad():
        assert torch.equal(module(z), output)
        module.alpha.zero_()
        assert torch.equal(module(z), module.native(z))
    assert torch.equal(gradients(module, z, grad)[0], module.native(z))


def test_alpha_alone_or_input_alone_may_need_a_gradient():
    z = pre_activations()
    for frozen in ("alpha", "input", "both"):
        module = activation()
        module.alpha.requires_grad_(frozen == "input")
        x = z.clone().requires_grad_(frozen == "alpha")
        output = module(x)
        assert output.requires_grad == (frozen != "both")
        if frozen != "both":
            output.sum().backward()
        assert (module.alpha.grad is not None) == (frozen == "input")
        assert (x.grad is not None) == (frozen == "alpha")


def test_an_activation_with_parameters_of_its_own_trains_them():
    native = nn.PReLU(1, init=0.2)
    module = CollapsibleActivation(native, WIDTH, alpha=0.25)
    z = pre_activations()
    module(z.requires_grad_()).sum().backward()
    expected = 0.75 * z.detach().clamp_max(0).sum()
    torch.testing.assert_close(native.weight.grad, expected[None])
    assert module.alpha.grad is not None


def test_used_twice_its_gradients_add():
    module = activation()
    first, second = pre_activations(), pre_activations(seed=1)
    (module(first).square().sum() + module(second).sum()).backward()
    both = module.alpha.grad.clone()
    module.alpha.grad = None
    module(first).square().sum().backward()
    one = module.alpha.grad.clone()
    module.alpha.grad = None
    module(second).sum().backward()
    torch.testing.assert_close(both, one + module.alpha.grad)


def test_second_derivatives():
    module = activation("silu")
    z = pre_activations(2, WIDTH, dtype=torch.float64, requires_grad=True)
    alpha = module.alpha.detach().double().requires_grad_()
    run = lambda z, alpha: torch.func.functional_call(module, {"alpha": alpha}, (z,))  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (z, alpha))
    # Of one alone, where the other needs no gradient.
    assert torch.autograd.gradgradcheck(lambda z: run(z, alpha.detach()), (z,))
    assert torch.autograd.gradgradcheck(lambda alpha: run(z.detach(), alpha), (alpha,))


# ----------------------------------------------------------------------------------------------------
# What it keeps
# ----------------------------------------------------------------------------------------------------


def saved_storages(function):
    """`{storage address: bytes}` of what autograd keeps for backward while `function` runs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return storages, output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_backward_keeps_no_more_than_the_native_activation_and_alpha(act, dtype):
    z = pre_activations(8, 128, WIDTH, dtype=dtype, requires_grad=True)
    native, _ = saved_storages(lambda: ACT2FN[act](z))
    patched, _ = saved_storages(lambda: activation(act)(z))
    assert sum(patched.values()) <= sum(native.values()) + 4
    assert z.untyped_storage().data_ptr() in patched


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
@pytest.mark.parametrize("act", ["gelu_new", "quick_gelu", "relu", "relu2", "tanh"])
def test_backward_keeps_only_the_input_and_what_the_module_owns(act, gate, target, granularity):
    module = activation(act, gate=gate, target=target, granularity=granularity)
    z = pre_activations(requires_grad=True)
    saved, _ = saved_storages(lambda: module(z))
    own = {tensor.untyped_storage().data_ptr() for tensor in [z, *module.parameters(), *module.buffers()]}
    assert saved.keys() <= own


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double", "to", "to_complete", "apply_float"])
def test_alpha_and_line_stay_float32_bit_for_bit(convert):
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), activation(target="affine", granularity="neuron"))
    before = {name: value.clone() for name, value in module[1].state_dict().items()}
    parameter = module[1].alpha
    dtype = torch.bfloat16
    if convert == "to":
        module.to(dtype)
    elif convert == "to_complete":
        module.to(torch.empty(0, dtype=dtype))
    elif convert == "apply_float":
        module.to(dtype).float()
        dtype = torch.float32
    else:
        getattr(module, convert)()
        dtype = {"half": torch.float16, "double": torch.float64}.get(convert, dtype)
    assert module[0].weight.dtype == dtype
    after = module[1].state_dict()
    assert set(before) == {"alpha", "slope", "offset"}
    for name, value in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], value), name
    assert module[1].alpha is parameter and parameter.requires_grad
    assert module(torch.randn(2, WIDTH, dtype=dtype)).dtype == dtype


def test_devices_follow_the_model():
    module = activation(target="affine").to("meta")
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    module.to_empty(device="cpu")
    assert all(tensor.dtype == torch.float32 and not tensor.is_meta for tensor in module.state_dict().values())


def test_a_native_activation_with_parameters_takes_the_dtype():
    module = CollapsibleActivation(nn.PReLU(), WIDTH).to(torch.bfloat16)
    assert module.native.weight.dtype == torch.bfloat16 and module.alpha.dtype == torch.float32
    assert module(torch.randn(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_initial_values(gate, target, granularity):
    module = CollapsibleActivation(
        nn.GELU(), WIDTH, linear_target=target, granularity=granularity, gate=gate, alpha=0.25
    )
    assert torch.equal(module.alpha, torch.full((1,) if granularity == "block" else (WIDTH,), 0.25))
    buffers = dict(module.named_buffers())
    if target == "identity":
        assert not buffers
    elif gate:
        assert buffers.keys() == {"offset"} and torch.equal(buffers["offset"], torch.ones(WIDTH))
    else:
        assert torch.equal(buffers["slope"], torch.ones(WIDTH)) and torch.equal(buffers["offset"], torch.zeros(WIDTH))


# ----------------------------------------------------------------------------------------------------
# What surrounds it
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_deepcopy_and_pickle(copied, gate, target, granularity):
    module = activation(gate=gate, target=target, granularity=granularity)
    z = pre_activations(requires_grad=True)
    module(z).sum().backward()
    other = copied(module)
    assert torch.equal(other(z), module(z)) and other.spec == module.spec
    with torch.no_grad():
        other.alpha.add_(0.1)
    assert not torch.equal(other(z), module(z))


def test_autocast():
    module, linear = activation(alpha=0.25), nn.Linear(WIDTH, WIDTH)
    x = pre_activations()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = linear(x)
        output = module(z)
        native = module.native(z)
    assert z.dtype == output.dtype == native.dtype == torch.bfloat16
    # Rounded to bfloat16 twice: the activation, then the output.
    torch.testing.assert_close(output.double(), reference(module, z), rtol=2**-7, atol=2**-8)
    output.sum().backward()
    assert module.alpha.grad.dtype == torch.float32 and linear.weight.grad is not None
    with torch.no_grad():
        module.alpha.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(linear(x)), module.native(linear(x)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    module = activation()
    z, grad = pre_activations(), pre_activations(seed=1)
    expected = gradients(module, z, grad)
    x = z.clone().requires_grad_()
    output = checkpoint(lambda x: module(2 * x / 2), x, use_reentrant=use_reentrant)
    output.backward(grad)
    assert torch.equal(output, expected[0])
    assert torch.equal(x.grad, expected[1][0]) and torch.equal(module.alpha.grad, expected[1][1])


@pytest.mark.parametrize(("gate", "target", "granularity"), KINDS)
def test_compiles_as_one_graph(gate, target, granularity):
    torch._dynamo.reset()
    module = activation(gate=gate, target=target, granularity=granularity)
    z, grad = pre_activations(), pre_activations(seed=1)
    expected = gradients(module, z, grad)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = z.clone().requires_grad_()
    output = compiled(x)
    actual = torch.autograd.grad(output, [x, module.alpha], grad)
    torch.testing.assert_close((output, actual), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), expected[0], rtol=1e-6, atol=1e-6)


def test_functional_gradients():
    module = activation()
    z = pre_activations(5, WIDTH)
    actual = torch.func.grad(lambda z: module(z).sum())(z)
    torch.testing.assert_close(actual, gradients(module, z, torch.ones_like(z))[1][0])
