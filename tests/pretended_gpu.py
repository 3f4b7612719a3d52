"""A GPU that is pretended: its tensors say that they lie on cuda:0, and compute on the CPU.

    with PretendedGPU():
        x = torch.ones(3, device=CUDA)
        x + torch.ones(3)        # RuntimeError, as on a GPU

Every operation of PyTorch passes through PretendedGPU.__torch_dispatch__, which refuses what a GPU
would refuse because of where tensors lie, and then runs the operation on the CPU. So there are
values, and a whole run of train.py goes through: `if` on a tensor, nonzero() and .item() included.
PyTorch's own FakeTensorMode has no values, takes indices and generators of any device, and in a
PyTorch for CUDA without a GPU its backward pass and its autocast end in an error.

Refused are
    * an operation on tensors of both devices. A GPU takes one number (a CPU tensor without
      dimensions) where it works element by element, and copies from one device to the other
    * CPU indices of a tensor on the GPU. A GPU takes them, but has to wait for the CPU
    * a generator of one device for random numbers on the other
    * numpy() of a tensor on the GPU
"""
import contextlib
from unittest import mock

import torch
from torch._decomp import decomposition_table
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
# without this function of newer versions, C++ code asks the driver which GPU "cuda" is
CUDA = "cuda" if hasattr(torch._C, "_ensureCUDADeviceGuardSet") else "cuda:0"
PINS = (aten.pin_memory.default, aten._pin_memory.default)
COPIES = (aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default)


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `on_cpu` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, on_cpu):
        # PyTorch's C++ code sees a meta tensor, for which nothing needs a driver, with the
        # dispatch keys of CUDA
        like = torch.empty_strided(on_cpu.shape, on_cpu.stride(), dtype=on_cpu.dtype,
                                   device="meta")
        return torch.Tensor._make_subclass(cls, like, device_for_backend_keys=GPU)

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the pretended GPU, which was left")

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self):
        return f"OnGPU({self.on_cpu})"

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, values):
        return torch.tensor(values, dtype=self.dtype, device=GPU)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update({k: v for k, v in vars(self).items() if k != "on_cpu"})
            memo[id(self)] = copy  # vars: a parameter stays one
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # torch.save writes the numbers, as of a CPU tensor
        return self.on_cpu.__reduce_ex__(protocol)


class PretendedGPU(TorchDispatchMode):
    """Inside of it, there is a GPU, whose name is CUDA."""

    def __enter__(self):
        if CUDA == "cuda":
            torch._C._ensureCUDADeviceGuardSet()
        with contextlib.ExitStack() as stack:
            for name, answer in (("is_available", True), ("is_bf16_supported", True),
                                 ("_lazy_init", None), ("device_count", 1),
                                 ("is_current_stream_capturing", False)):
                stack.enter_context(mock.patch.object(
                    torch.cuda, name, lambda *_, _answer=answer, **__: _answer))
            # optimisers take lists of parameters at once on a GPU
            stack.callback(_foreach_supported_types.remove, OnGPU)
            _foreach_supported_types.append(OnGPU)
            # Module.to puts a tensor of another class in a parameter's place
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion,
                           torch.__future__.get_overwrite_module_params_on_conversion())
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            # torch.tensor(..., device="cuda") makes a CPU tensor and then moves it
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            self.stack = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PINS:  # memory is pinned by the driver of a GPU that is there
            return args[0]
        given = []  # what the operation gets, without the lists around it

        def on_cpu(x):
            given.append(x)
            if isinstance(x, OnGPU):
                return x.on_cpu
            return CPU if isinstance(x, torch.device) else x
        cpu_args, cpu_kwargs = each(on_cpu, args), each(on_cpu, kwargs or {})
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        device = device_of_result(func, tensors, given)
        refuse_mixed_devices(func, tensors, given, device)
        try:
            result = func(*cpu_args, **cpu_kwargs)
        except NotImplementedError:  # CUDA alone has it; PyTorch also has it in terms of others
            result = decomposition_table[func](*cpu_args, **cpu_kwargs)
        if device == CPU:
            return result
        of_cpu = {id(x.on_cpu): x for x in tensors if isinstance(x, OnGPU)}

        def on_gpu(x):
            if not isinstance(x, torch.Tensor):
                return x
            # an operation in place returns the tensor that it was given
            return of_cpu[id(x)] if id(x) in of_cpu else OnGPU(x)
        return each(on_gpu, result)


def each(function, tree):
    """The function of everything in nested tuples, lists and dicts."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([each(function, x) for x in tree])
    if isinstance(tree, dict):
        return {key: each(function, x) for key, x in tree.items()}
    return function(tree)


def device_of_result(func, tensors, given):
    """Where the result of an operation lies: where it is asked for, else where its tensors lie."""
    if func is aten.copy_.default:
        tensors = tensors[:1]  # it is copied to where the first one lies
    for x in given:
        if isinstance(x, torch.device):
            return CPU if x.type == "cpu" else GPU  # meta: C++ code repeats what it was told
    return GPU if any(isinstance(x, OnGPU) for x in tensors) else CPU


def refuse_mixed_devices(func, tensors, given, device):
    """RuntimeError for what a GPU refuses, and for what it does only after waiting."""
    for x in given:
        if isinstance(x, torch.Generator) and x.device.type != device.type:
            raise RuntimeError(f"{func}: a generator of {x.device} for numbers on {device}")
    on_cpu = [x for x in tensors if not isinstance(x, OnGPU)]
    if len(on_cpu) in (0, len(tensors)) or func in COPIES:
        return
    one_number = all(x.dim() == 0 for x in on_cpu) and torch.Tag.pointwise in func.tags
    if not one_number or not isinstance(tensors[0], OnGPU) and func._schema.is_mutable:
        places = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{func} on tensors of two devices: {places}")
