"""What torch would run on an H100, looked at without one: its kernels, and whether they compile.

    pip install torch==2.14.1    # a build for CUDA
    python benchmarks/gpu_code.py

A training step and a decoding step are traced on the CPU with on_cuda() answering yes, their graphs
are moved to a pretended H100, inductor generates its code for it, and Triton compiles every kernel
for sm_90. One line a step: graphs, Triton kernels that run, calls of libraries (matmuls and
attention), and buffers as large as one layer's keys. Attention by SDPA keeps the name of the CPU's
kernel, as it is chosen when traced; it is one call either way.
"""

import argparse
import collections
import os
import re
import sys
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
import torch._dynamo.backends.common
import torch._inductor.compile_fx
import torch._inductor.graph
import torch._inductor.runtime.triton_helpers
import torch.utils._triton
import triton
from functorch.compile import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent.parent))
import standalone_transformer_lm as lm

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "total_memory": 80 * 10**9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 * 2**20,
    "gcnArchName": "",
}
SHAPE = {"n_layer": 2, "d_model": 256, "n_head": 4, "vocab_size": 4096, "seq_len": 256}
KINDS = {
    "plain": {},
    "doc_mask": {"doc_mask": True},
    "window and sinks": {"window": 64, "n_sink": 4},
    "experts": {"n_expert": 8, "n_expert_active": 2, "ffn_mult": 1.0},
}


class Generated(BaseException):
    """Inductor has generated its code, and needs no device to load it."""


class PretendedDriver:
    """Triton's driver of a device that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cuda:0")

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0

    def get_device_interface(self):
        return torch.cuda


def pretend(codes: list[str]) -> None:
    """Have torch believe that there is an H100; code that inductor generates goes to `codes`."""
    properties = collections.namedtuple("Properties", H100)(**H100)
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_compute_capability": lambda device=None: 90,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    interface = torch._dynamo.device_interface.CudaInterface
    for name, fact in facts.items():
        for owner in (torch.cuda, interface, interface.Worker):
            if hasattr(owner, name):
                setattr(owner, name, fact if owner is torch.cuda else staticmethod(fact))

    def generate(graph):
        code = graph.codegen()[0]
        codes.append(getattr(code, "value", code))
        raise Generated

    torch._inductor.graph.GraphLowering.compile_to_module = generate
    triton.runtime.driver.set_active(PretendedDriver())
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    for function in vars(torch.utils._triton).values():  # that found no device before
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def traced(function, *arguments) -> list:
    """The graphs of a call, forward and backward, as aot_autograd gives them to inductor."""
    graphs = []

    def keep(graph, inputs):
        graphs.append((graph, inputs))
        return make_boxed_func(graph.forward)

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        inference_compiler=keep,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    step = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = step(*arguments)
    if result.requires_grad:
        result[0].backward()
    return graphs


def on_gpu(value):
    if isinstance(value, torch.device):
        return torch.device("cuda:0")
    return value


def move(graph, inputs) -> tuple:
    """A graph and its inputs on the pretended device."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.args = torch.fx.node.map_aggregate(node.args, on_gpu)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, on_gpu)
            module.recompile()

    def fake(value):
        if not isinstance(value, torch.Tensor):
            return value
        shape, stride = map(int, value.shape), map(int, value.stride())
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=value.dtype, device="cuda:0")

    class Propagate(torch.fx.Interpreter):
        def run_node(self, node):
            node.meta["val"] = found = super().run_node(node)
            return found

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [fake(value) for value in inputs]
        for module in graph.modules():  # those of masks within FlexAttention
            if isinstance(module, torch.fx.GraphModule) and module is not graph:
                for node in module.graph.nodes:
                    node.meta["val"] = torch.utils._pytree.tree_map(fake, node.meta.get("val"))
        Propagate(graph).run(*inputs)
    return mode, inputs


def compile_kernels(code: str) -> int:
    """Compile each Triton kernel of a generated module for sm_90; how many there are."""
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
    for name, source in kernels:
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        module = {"__name__": name, "__file__": str(path)}
        exec(compile(source, str(path), "exec"), module)
        tuner = module[name]
        tuner._precompile_config(tuner.configs[0])
        path.unlink()
    return len(kernels)


def describe(label: str, graphs: list, codes: list[str], layer: int) -> None:
    kernels = calls = large = compiled = 0
    for graph, inputs in graphs:
        mode, inputs = move(graph, inputs)
        try:
            with tracing(TracingContext(mode)), V.set_fake_mode(mode):
                torch._inductor.compile_fx.compile_fx_inner(graph, inputs)
        except Generated:
            pass
        code = codes.pop()
        body = code[code.index("def call(") :]
        kernels += len(re.findall(r"\.run\(", body))
        calls += len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(", body))
        for shape in re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", body):
            size = 1
            for number in re.findall(r"\d+", shape):
                size *= int(number)
            large += size >= layer
        compiled += compile_kernels(code)
    print(
        f"{label}: {len(graphs)} graphs, {kernels} Triton launches of {compiled} kernels, all "
        f"compiled for sm_90, {calls} library calls, {large} buffers of a layer's keys",
        flush=True,
    )


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    lm.on_cuda = lambda x: True
    flex_attention._validate_device = lambda *_: None
    codes: list[str] = []
    traces = []
    for kind, more in KINDS.items():
        config = lm.ModelSettings(**{**SHAPE, **more})
        model = lm.Transformer(config)
        model.init_weights(1)
        ids = torch.ones(4, config.seq_len, dtype=torch.long)
        objective = lm.Objective(model.train(), lm.pretrain_loss)
        traces.append((f"training, {kind}", traced(objective, ids, ids), 1 << 60))

        model = lm.lower_weights(model.eval().requires_grad_(False), torch.bfloat16)
        cache = lm.KVCache(config, 8, torch.device("cpu"), torch.bfloat16).first(8)
        arguments = model, ids[:1, :8].T, torch.full((8, 1), 9), cache, 256
        with torch.inference_mode():
            graphs = traced(lm.Transformer.next_logits, *arguments)
        traces.append((f"decoding 8 rows, {kind}", graphs, cache.k[0].numel()))
    pretend(codes)
    for label, graphs, layer in traces:
        describe(label, graphs, codes, layer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
