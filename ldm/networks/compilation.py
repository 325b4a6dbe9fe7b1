"""Engines that run a network faster: torch's compiler, and OpenVINO on CPUs.

An engine replaces only the call of a network. Samplers, guidance, masks and callbacks stay the same.
"""

import copy
import logging
import math
import shutil
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from importlib.util import find_spec
from typing import Any, ClassVar, assert_never, get_args

import torch
from torch import Tensor, nn

from ldm.errors import RunError, UserError, one_line
from ldm.kinds import EngineKind
from ldm.networks.backbone import Backbone

Shapes = tuple[int, tuple[tuple[int, ...], ...]]
"""Batch size, and the other dimensions of each input."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference from the plain network, relative to its output. The usual one is far smaller (1e-6 and 1e-2)."""


class Engine(ABC):
    """A compiled module `(*inputs) → output`. Inputs and output are tensors whose first dimension is the batch.

    Each new combination of input shapes is compiled, and its first output is compared with that of the module itself.
    A batch is padded to a compiled size instead, if that is at most twice as large. If compiling is slow, further
    combinations are compiled only when they are used often. The weights are those at the time of compiling.
    """

    kind: ClassVar[EngineKind]
    pays: ClassVar[float]
    """Seconds of work from which compiling takes less time than it saves."""
    patience: ClassVar[int] = 0
    """Number of calls in which the module itself runs for input shapes that aren't the first ones."""

    def __init__(self, module: nn.Module, required: bool = True) -> None:
        """Prepare the engine of a module. required: raise RunError if it doesn't work, instead of doing without it."""
        self.module, self.required = module.eval(), required
        self.checked: set[Shapes] = set()
        self.waiting = Counter[Shapes]()
        self.failed = False

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.failed:
            return self.module(*inputs)
        b, shapes = len(inputs[0]), tuple(tuple(x.shape[1:]) for x in inputs)
        if (size := min((n for n, rest in self.checked if rest == shapes and b <= n <= 2 * b), default=0)) == 0:
            self.waiting[b, shapes] += 1
            if self.checked and self.waiting[b, shapes] <= self.patience:
                return self.module(*inputs)
            return self._first((b, shapes), inputs)
        if size > b:
            inputs = tuple(torch.cat([x, x[-1:].expand(size - b, *x.shape[1:])]) for x in inputs)
        return self.run((size, shapes), inputs)[:b]

    def _first(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
        """Compile the module for these shapes, and return the output if it is correct."""
        expected = self.module(*inputs)
        try:
            output = self.run(shapes, inputs)
            difference = float((output - expected).float().norm() / expected.float().norm().clamp_min(1e-9))
            problem = "" if difference <= _TOLERANCE[expected.dtype] else f"its output differs by {difference:.1e}"
        except Exception as error:  # compilers raise errors of many kinds
            problem = one_line(error, 300)
        if not problem:
            self.checked.add(shapes)
            return output
        message = f"optimize {self.kind} doesn't work for this network: {problem}"
        if self.required:
            raise RunError(f"{message}; choose off")
        logging.getLogger(__name__).warning("%s; continuing without it", message)
        self.failed = True
        return expected

    @abstractmethod
    def run(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the module's output, after compiling it for these shapes if that hasn't been done."""


class TorchEngine(Engine):
    """torch.compile. On a CPU, the weights become constants in the layout that its kernels need.

    On a GPU, the weights become channels_last, and the kernels of a call run as one CUDA graph.
    """

    kind = "compile"
    pays = 200.0
    patience = 200

    def __init__(self, module: nn.Module, required: bool = True) -> None:
        super().__init__(module, required)
        self.on_cpu = next(module.parameters()).device.type == "cpu"
        if not self.on_cpu:
            module.to(memory_format=torch.channels_last)
        options: dict[str, Any] | None = None if self.on_cpu else {"triton.cudagraphs": True}
        self.compiled = torch.compile(module, fullgraph=True, dynamic=False, options=options)

    def run(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.on_cpu and shapes not in self.checked:
            from torch._dynamo import config as tracing
            from torch._inductor import config

            # Not options of torch.compile: there, TorchDynamo ignores `freezing`.
            with config.patch(freezing=True, cpp_wrapper=True), tracing.patch(recompile_limit=64):
                return self.compiled(*inputs)
        if self.on_cpu:
            return self.compiled(*inputs)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(*inputs).clone()  # the next call overwrites the graph's own output


class OpenVinoEngine(Engine):
    """OpenVINO on the CPU, one model of fixed shapes for each combination of input shapes."""

    kind = "openvino"
    pays = 15.0

    def __init__(self, module: nn.Module, required: bool = True) -> None:
        super().__init__(module, required)
        self.models: dict[Shapes, _OpenVinoModel] = {}

    def run(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
        if shapes not in self.models:
            self.models[shapes] = _OpenVinoModel(self._compile(inputs), inputs)
        return self.models[shapes](inputs)

    def _compile(self, inputs: tuple[Tensor, ...]) -> Any:
        """Compile the module for inputs of these shapes, and return a request that runs it."""
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        dtype = next(self.module.parameters()).dtype
        example = tuple(x.float() for x in inputs)
        with warnings.catch_warnings():  # about torch.jit, and about shapes that are constants here
            warnings.simplefilter("ignore")
            module = self.module if dtype == torch.float32 else copy.deepcopy(self.module).float()
            traced = torch.jit.freeze(torch.jit.trace(module, example, check_trace=False))
        decoder = TorchScriptPythonDecoder(traced)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
        for node in model.inputs:
            node.get_node().set_element_type(openvino.Type.f32)
        model.reshape({node: list(x.shape) for node, x in zip(model.inputs, example, strict=True)})
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


class _OpenVinoModel:
    """A request of OpenVINO whose inputs and output are tensors in the memory of torch."""

    def __init__(self, request: Any, inputs: tuple[Tensor, ...]) -> None:
        """Allocate tensors for inputs of these shapes, float32."""
        import openvino

        self.request = request
        self.buffers = [torch.empty(x.shape) for x in inputs]
        self.last: list[Tensor | None] = [None] * len(inputs)
        for i, buffer in enumerate(self.buffers):
            request.set_input_tensor(i, openvino.Tensor(buffer.numpy(), shared_memory=True))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output. From the third input on, the same object as in the last call isn't copied again."""
        for i, x in enumerate(inputs):
            if i < 2 or x is not self.last[i]:
                self.buffers[i].copy_(x)
                self.last[i] = x
        self.request.infer()
        return torch.from_numpy(self.request.get_output_tensor(0).data).to(inputs[0].dtype, copy=True)


class EngineNetwork:
    """A backbone `(x, time, condition) → prediction` whose core an engine runs.

    What depends only on the condition is computed once; the last condition is recognised by identity.
    """

    def __init__(self, backbone: Backbone, engine: Engine) -> None:
        self.backbone, self.engine = backbone, engine
        self.condition: Tensor | None = None
        self.prompt: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, time: Tensor, condition: Tensor, scale: Tensor | None = None) -> Tensor:
        if condition is not self.condition:
            self.condition, self.prompt = condition, self.backbone.per_prompt(condition)
        return self.engine(x.to(self.backbone.dtype), self.backbone.per_step(time, scale), *self.prompt)


def choose_engine(
    kind: EngineKind, device: torch.device, dtype: torch.dtype, seconds: float = math.inf
) -> type[Engine] | None:
    """Return the engine for a network; None: no engine.

    seconds: expected time of the work without an engine; `auto` chooses no engine if compiling would cost more time
    than it saves. Raises UserError if an engine can't be used here.
    """
    if kind not in get_args(EngineKind):
        raise UserError(f"optimize {kind!r}: choose {', '.join(get_args(EngineKind))}")
    problem = ""
    engine: type[Engine] | None = None
    match kind:
        case "off":
            return None
        case "auto":
            if not _openvino_problem(device, dtype):
                engine = OpenVinoEngine
            elif not compile_problem(device):
                engine = TorchEngine
            return engine if engine and seconds > engine.pays else None
        case "compile":
            engine = TorchEngine
            if problem := compile_problem(device):
                problem += "; choose off"
        case "openvino":
            problem, engine = _openvino_problem(device, dtype), OpenVinoEngine
        case _:
            assert_never(kind)
    if problem:
        raise UserError(f"optimize {kind}: {problem}")
    return engine


def compile_problem(device: torch.device) -> str:
    """Return why torch.compile can't be used on a device; empty if it can."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "needs a C++ compiler, such as g++"
    if device.type not in ("cpu", "cuda"):
        return f"needs a CPU or a CUDA GPU, but the device is {device}"
    return ""


def _openvino_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Return why OpenVINO can't be used; empty if it can."""
    if device.type != "cpu":
        return f"needs device cpu, but the device is {device}; choose compile"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"needs fp32 or bf16, but the weights are {str(dtype).removeprefix('torch.')}; choose another precision"
    return "" if find_spec("openvino") else "OpenVINO isn't installed; install it with pip install openvino"
