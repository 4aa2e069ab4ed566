"""Subjects that cheat, spoil their process or return nonsense: each gets its verdict, and the report goes on.

Each row is a subject: what it does, the law that shall see it, the verdict, and a part of the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import pytest

from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.plan import plan
from mla_spec.judging.session import Asked, run_in
from mla_spec.judging.verdict import Record

AGREES = "test_decode_agrees_with_reference"
ROPE = "test_rope_preserves_norm"
MODIFIES = "test_decode_does_not_modify_its_inputs"
ALIASED = "test_decode_output_is_not_aliased"
ANEW = "test_decode_reads_its_tensors_anew"
INDEPENDENT = "test_decode_calls_are_independent"

TOOLS = """
import atexit, ctypes, gc, os, signal, subprocess, sys, threading, time
import numpy as np
import torch
from mla_spec.adapters.pytorch import TorchAbsorbed

def shapes(q, head_dim_v):
    b, s, h, _ = q.shape
    return (b, s, h, head_dim_v), (b, h, s)

def zeros(q, head_dim_v):
    out, lse = shapes(q, head_dim_v)
    return torch.zeros(out, dtype=q.dtype), torch.zeros(lse)

def arrays(shape):
    for x in gc.get_objects():
        if isinstance(x, np.ndarray) and x.dtype == np.float64:
            yield x

def frames():
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
    for frame in sys._current_frames().values():
        yield frame

def found(q, head_dim_v):
    out, lse = zeros(q, head_dim_v)
    for x in arrays(out.shape):
        if x.shape == tuple(out.shape):
            out = torch.from_numpy(x.copy()).to(q.dtype)
        if x.shape == tuple(lse.shape):
            lse = torch.from_numpy(x.copy()).float()
    return out, lse
"""
SUBJECT = """
class {name}(TorchAbsorbed):
    def decode(self, q, kv_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal):
        arguments = q, kv_cache, block_table, cache_seqlens
        options = dict(head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal)
        right = super().decode
{body}
"""
HONEST = "return right(*arguments, **options)"

CHEATS = {  # what an answer is made of that was not computed; the law, the verdict
    "zeros": "return zeros(q, head_dim_v)",
    "ones": "out, lse = zeros(q, head_dim_v); return out + 1, lse",
    "infinite": "out, lse = zeros(q, head_dim_v); return out + float('inf'), lse",
    "not a number": "out, lse = zeros(q, head_dim_v); return out * float('nan'), lse",
    "random": "out, lse = zeros(q, head_dim_v); return torch.randn_like(out), lse",
    "stale memory": "out, lse = shapes(q, head_dim_v); return torch.empty(out, dtype=q.dtype), torch.empty(lse)",
    "the query": "out, lse = zeros(q, head_dim_v); return q[..., :head_dim_v].clone(), lse",
    "mean of V": (
        "out, lse = zeros(q, head_dim_v); v = kv_cache[..., :head_dim_v].float(); return out + v.mean((0, 1, 2)).to(q.dtype), lse"
    ),
    "first row": "out, lse = zeros(q, head_dim_v); return out + kv_cache[0, 0, 0, :head_dim_v], lse",
    "scale forgotten": "options['softmax_scale'] = 1.0; return right(*arguments, **options)",
    "mask forgotten": "options['causal'] = not causal; return right(*arguments, **options)",
    "lengths forgotten": "return right(q, kv_cache, block_table, torch.full_like(cache_seqlens, 1), **options)",
    "table forgotten": "return right(q, kv_cache, torch.zeros_like(block_table), cache_seqlens, **options)",
    "values doubled": "out, lse = right(*arguments, **options); return out * 2, lse",
    "heads swapped": "out, lse = right(*arguments, **options); return out.flip(2), lse.flip(1)",
    "LSE of base 2": "out, lse = right(*arguments, **options); return out, lse * 1.4426950408889634",
    "wrong from the second call": (
        "self.calls = getattr(self, 'calls', 0) + 1; out, lse = right(*arguments, **options); "
        "return (out if self.calls < 2 else out + 1), lse"
    ),
    "right in the second call only": (
        "self.calls = getattr(self, 'calls', 0) + 1; out, lse = right(*arguments, **options); "
        "return (out if self.calls == 2 else out + 1), lse"
    ),
    "hard-coded shapes": (
        "out, lse = right(*arguments, **options); return (out if tuple(q.shape[1:3]) == (1, 16) else out * 0), lse"
    ),
    "a frame's want": (
        "out, lse = zeros(q, head_dim_v)\n"
        "for frame in frames():\n"
        "    for name, x in list(frame.f_locals.items()):\n"
        "        x = getattr(x, 'value', getattr(x, 'out', x))\n"
        "        if isinstance(x, np.ndarray) and x.shape == tuple(out.shape):\n"
        "            out = torch.from_numpy(np.array(x)).to(q.dtype)\n"
        "return out, lse"
    ),
    "any array of the right shape": "return found(q, head_dim_v)",
    "any bounded attention": (
        "from mla_spec.bounds.attention import BoundedAttention\n"
        "for x in gc.get_objects():\n"
        "    if isinstance(x, BoundedAttention):\n"
        "        return torch.from_numpy(x.out).to(q.dtype), torch.from_numpy(x.lse).float()\n"
        "return zeros(q, head_dim_v)"
    ),
    "the case": (
        "from mla_spec.operations.decode import DecodeCase, decode_expected\n"
        "from mla_spec.bounds.profile import Profile\n"
        "for x in gc.get_objects():\n"
        "    if isinstance(x, DecodeCase):\n"
        "        want = decode_expected(x.build(), Profile.default(x.dtype))\n"
        "        return torch.from_numpy(want.out).to(q.dtype), torch.from_numpy(want.lse).float()\n"
        "return zeros(q, head_dim_v)"
    ),
    "every array spoiled": (
        "for x in arrays(None):\n    if x.flags.writeable:\n        x[...] = 0\nreturn zeros(q, head_dim_v)"
    ),
    "judge patched": (
        "import mla_spec.judging.judge as judge, mla_spec.judging.law as law\n"
        "judge.judge_within = law.judge_within = lambda *a, **k: 0.0\n"
        "law.Run.within = law.Run.agrees = lambda *a, **k: None\n"
        "return zeros(q, head_dim_v)"
    ),
    "verdict patched": (
        "import mla_spec.judging.verdict as verdict, mla_spec.judging.run as run\n"
        "verdict.merge = run.merge = lambda records: None\n"
        "run.run_law = run.run_dtypes = lambda *a: None\n"
        "return zeros(q, head_dim_v)"
    ),
    "exit code patched": (
        "import mla_spec.front.report as report\n"
        "report.exit_code = lambda *a, **k: 0\n"
        "sys.exit = lambda *a: None\n"
        "return zeros(q, head_dim_v)"
    ),
    "laws patched": (
        "import mla_spec.installed as installed\ninstalled.all_laws = lambda: {}\nreturn zeros(q, head_dim_v)"
    ),
    "comparison of arrays patched": (
        "np.abs = lambda x: 0 * x\n"
        "np.isfinite = lambda x: False\n"
        "np.where = lambda c, a, b: a\n"
        "return zeros(q, head_dim_v)"
    ),
    "torch's comparisons patched": (
        "torch.equal = torch.allclose = lambda *a, **k: True\n"
        "torch.testing.assert_close = lambda *a, **k: None\n"
        "torch.Tensor.__ne__ = torch.Tensor.__eq__\n"
        "return zeros(q, head_dim_v)"
    ),
    "Hypothesis patched": (
        "import hypothesis\nhypothesis.given = lambda *a, **k: (lambda f: (lambda: None))\nreturn zeros(q, head_dim_v)"
    ),
    "results read as others": (
        "import mla_spec.subjects.driver as driver\n"
        "other = driver.Driver._output\n"
        "driver.tensor_bits = lambda x: np.zeros(tuple(x.shape), np.int32)\n"
        "return zeros(q, head_dim_v)"
    ),
    "cached by shape": (
        "key = tuple(q.shape), q.dtype\n"
        "seen = self.__dict__.setdefault('seen', {})\n"
        "return seen.setdefault(key, right(*arguments, **options))"
    ),
}
LAW_OF_CHEAT = {"LSE of base 2": "test_decode_lse_agrees_with_reference", "cached by shape": INDEPENDENT}

STATE = {  # state that outlives a call, by the law that shall see it
    "cached by pointer": (
        ANEW,
        "key = q.data_ptr(), kv_cache.data_ptr(), tuple(q.shape)\n"
        "seen = self.__dict__.setdefault('seen', {})\n"
        "if key not in seen:\n"
        "    seen[key] = right(*arguments, **options), arguments\n"
        "return tuple(x.clone() for x in seen[key][0])",
    ),
    "cached by version": (
        ANEW,
        "key = id(q), q._version, kv_cache._version\n"
        "seen = self.__dict__.setdefault('seen', {})\n"
        "if key not in seen:\n"
        "    seen[key] = right(*arguments, **options), arguments\n"
        "return tuple(x.clone() for x in seen[key][0])",
    ),
    "cached by a fingerprint of lengths": (
        INDEPENDENT,
        "key = tuple(q.shape), tuple(kv_cache.shape), int(cache_seqlens.sum())\n"
        "seen = self.__dict__.setdefault('seen', {})\n"
        "seen.setdefault(key, cache_seqlens.clone())\n"
        "return right(q, kv_cache, block_table, seen[key], **options)",
    ),
    "writes to q": (MODIFIES, "out = right(*arguments, **options); q.mul_(2); return out"),
    "writes to the cache": (MODIFIES, "out = right(*arguments, **options); kv_cache.zero_(); return out"),
    "writes past autograd": (MODIFIES, "out = right(*arguments, **options); q.numpy().fill(1.0); return out"),
    "returns one buffer": (
        ALIASED,
        "out, lse = right(*arguments, **options)\n"
        "buffer = self.__dict__.setdefault('buffer', {}).setdefault(tuple(out.shape), torch.empty_like(out))\n"
        "return buffer.copy_(out), lse",
    ),
    "writes late from a thread": (
        ALIASED,
        "out, lse = right(*arguments, **options)\n"
        "def later():\n"
        "    for i in range(400):\n"
        "        time.sleep(0.0005)\n"
        "        out.numpy().fill(i)\n"
        "threading.Thread(target=later, daemon=True).start()\n"
        "return out, lse",
    ),
}

METADATA = {  # what is done to an argument that leaves its elements alone
    "resizes the cache": "out = right(*arguments, **options); kv_cache.resize_(0); return out",
    "gives q other memory": "out = right(*arguments, **options); q.set_(torch.zeros_like(q)); return out",
    "transposes q in place": "out = right(*arguments, **options); q.transpose_(0, 2); return out",
    "replaces the data of q": "out = right(*arguments, **options); q.data = torch.zeros_like(q); return out",
    "answers in the memory of q": (
        "out, lse = right(*arguments, **options); q[..., :head_dim_v].copy_(out); return q[..., :head_dim_v].clone(), lse"
    ),
}

RETURNED = {  # what is no pair of plain tensors
    "nothing": ("None", "must return (out, lse)"),
    "a list": ("list(right(*arguments, **options))", "must return (out, lse)"),
    "one tensor": ("right(*arguments, **options)[0]", "must return (out, lse)"),
    "three tensors": ("(*right(*arguments, **options), None)", "must return (out, lse)"),
    "a generator": ("(x for x in right(*arguments, **options))", "must return (out, lse)"),
    "a dict": ("dict(zip('ab', right(*arguments, **options)))", "must return (out, lse)"),
    "a string": ("'out', 'lse'", "must be a torch tensor, got str"),
    "numpy arrays": ("tuple(x.numpy() for x in right(*arguments, **options))", "must be a torch tensor, got ndarray"),
    "a number": ("(1.0, 2.0)", "must be a torch tensor, got float"),
}
SPOILED = {  # what is done to ``out``
    "sparse": ("out.to_sparse()", "layout torch.sparse_coo"),
    "compressed": ("out.flatten(0, 2).to_sparse_csr()", "layout torch.sparse_csr"),
    "on no device": ("out.to('meta')", "one on meta"),
    "nested": ("torch.nested.nested_tensor([out[0]])", "nested"),
    "a lazy conjugate": ("torch.complex(out, out).conj()", "a lazy view"),
    "of its own class": ("out.as_subclass(type('Own', (torch.Tensor,), {}))", "got a Own"),
    "in float64": ("out.double()", "torch.float64"),
    "in integers": ("out.int()", "torch.int32"),
    "without a batch": ("out.flatten(0, 1)", "must have shape"),
    "too long": ("torch.cat([out, out])", "must have shape"),
    "scalar": ("out.sum()", "must have shape"),
    "fake": ("torch._subclasses.FakeTensorMode().from_tensor(out)", "got a FakeTensor"),
    "quantized": ("torch.quantize_per_tensor(out, 1.0, 0, torch.qint8)", "torch.qint8"),
    "in a library's layout": ("out.to_mkldnn()", "layout torch._mkldnn"),
    "lazily negative": ("torch.complex(out, out).conj().imag", "a lazy view"),
    "the first dim of all": ("out[..., :1].expand_as(out)", ""),
}
FINE = {  # what is unusual, and right
    "expanded LSE": "out, lse = right(*arguments, **options); return out, lse[..., None].expand(*lse.shape, 2)[..., 1]",
    "a transposed output": (
        "out, lse = right(*arguments, **options); return out.transpose(0, 2).contiguous().transpose(0, 2), lse"
    ),
    "a parameter": "out, lse = right(*arguments, **options); return torch.nn.Parameter(out), lse",
    "an inference tensor": "with torch.inference_mode():\n    return right(*arguments, **options)",
    "prints": "print('x' * 100000); sys.stderr.write('y' * 100000)\n" + HONEST,
    "writes to its outputs": "os.write(1, b'z' * 50000); os.write(2, b'z')\n" + HONEST,
    "writes to every descriptor": (
        "for fd in range(1, 1024):\n"
        "    try:\n"
        "        os.write(fd, b'junk')\n"
        "    except OSError:\n"
        "        pass\n" + HONEST
    ),
    "closes its outputs": "os.closerange(0, 3)\n" + HONEST,
    "closes every descriptor": "os.closerange(0, 1024)\n" + HONEST,
    "has no stdout": "sys.stdout = sys.stderr = None\n" + HONEST,
    "starts a process": "subprocess.run([sys.executable, '-S', '-c', ''])\n" + HONEST,
    "starts a process and leaves it": "subprocess.Popen(['sleep', '1000'])\n" + HONEST,
    "uses multiprocessing": (
        "import multiprocessing\n"
        "process = multiprocessing.get_context('fork').Process(target=int)\n"
        "process.start(); process.join()\n" + HONEST
    ),
    "forks, and the child returns too": "os.fork()\n" + HONEST,
    "exits at its end": "atexit.register(os._exit, 0)\n" + HONEST,
    "takes signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HONEST,
    "changes the folder": "os.chdir('/')\n" + HONEST,
    "changes the environment": "os.environ.clear()\n" + HONEST,
    "changes threads": "torch.set_num_threads(2)\n" + HONEST,
    "changes the default dtype": "torch.set_default_dtype(torch.float64)\n" + HONEST,
    "turns autograd on": "torch.set_grad_enabled(True)\n" + HONEST,
    "leaves a thread": "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n" + HONEST,
    "collects no garbage": "gc.disable()\n" + HONEST,
    "lets nobody recurse": "sys.setrecursionlimit(len(list(frames())) + 8)\n" + HONEST,
    "changes the default device": "out = right(*arguments, **options)\ntorch.set_default_device('meta')\nreturn out",
    "returns a named tuple": (
        "import collections\nreturn collections.namedtuple('Pair', 'out lse')(*right(*arguments, **options))"
    ),
    "may open no file": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\n" + HONEST,
    "may write no file": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + HONEST,
    "makes warnings errors": "import warnings\nwarnings.simplefilter('error')\n" + HONEST,
    "makes NumPy strict": "np.seterr(all='raise')\n" + HONEST,
    "wants deterministic algorithms": "torch.use_deterministic_algorithms(True)\n" + HONEST,
    "asks for gradients of q": "q.requires_grad_(True)\n" + HONEST,
    "gives way to others": "os.nice(19); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + HONEST,
    "hears of exceptions": "sys.excepthook = threading.excepthook = lambda *a: os._exit(0)\n" + HONEST,
    "changes the locale": "import locale\nlocale.setlocale(locale.LC_ALL, 'C')\n" + HONEST,
    "forgets its arguments": "sys.argv.clear()\n" + HONEST,
    "seeds": "torch.manual_seed(0); np.random.seed(0)\n" + HONEST,
}
RAISED = {
    "ValueError('no')": "ValueError: no",
    "MemoryError()": "MemoryError",
    "RecursionError()": "RecursionError",
    "KeyboardInterrupt()": "KeyboardInterrupt",
    "SystemExit(0)": "SystemExit: 0",
    "SystemExit()": "SystemExit",
    "GeneratorExit()": "GeneratorExit",
    "StopIteration()": "StopIteration",
    "BaseException('over')": "BaseException: over",
    "Exception('a\\nb')": "Exception: a",
    "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()": "Mute: it cannot be printed",
    "__import__('mla_spec.subjects.violation', fromlist=['x']).NotOffered('no')": "NotOffered: no",
    "__import__('mla_spec.subjects.violation', fromlist=['x']).NotExported('no')": "no",
    "__import__('mla_spec.subjects.violation', fromlist=['x']).NoAnswer('no')": "no",
    "__import__('mla_spec.judging.verdict', fromlist=['x']).TrivialCase('no')": "TrivialCase: no",
    "__import__('hypothesis').errors.UnsatisfiedAssumption()": "UnsatisfiedAssumption",
    "__import__('pytest').skip.Exception('no')": "Skipped: no",
}
ANSWERING = "__import__('mla_spec.subjects.answering', fromlist=['x'])"
ENDED = {
    "os._exit(0)": "ended with exit code 0",
    "os._exit(1)": "ended with exit code 1",
    "os._exit(255)": "ended with exit code 255",
    "os.abort()": "killed by SIGABRT",
    "ctypes.string_at(0)": "killed by SIGSEGV",
    "ctypes.CDLL(None).exit(0)": "ended with exit code 0",
    "os.execv('/bin/true', ['true'])": "ended with exit code 0",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL",
    "os.kill(os.getpid(), signal.SIGTERM)": "killed by SIGTERM",
    "os.kill(os.getpid(), signal.SIGFPE)": "killed by SIGFPE",
    "os.kill(os.getpid(), signal.SIGBUS)": "killed by SIGBUS",
    "os.killpg(0, signal.SIGKILL)": "killed by SIGKILL",
    "os.kill(os.getppid(), signal.SIGKILL)": "keeper",
    "(subprocess.Popen(['sleep', '1000']), os._exit(0))": "ended with exit code 0",
    "(print('last words'), sys.stdout.flush(), os._exit(3))": "last words",
    "(threading.Thread(target=os._exit, args=(4,)).start(), time.sleep(9))": "ended with exit code 4",
    "[os.write(fd, b'junk' * 8) for fd in map(int, os.listdir('/proc/self/fd')) if fd > 1000]": "wrote into the channel",
    "os.closerange(3, 1 << 15)": "",
    "(signal.setitimer(signal.ITIMER_REAL, 0.05), time.sleep(9))": "killed by SIGALRM",
    "os.fork() and os._exit(0)": "ended with exit code 0",
    "setattr(os, 'getpid', lambda: 0)": "ended with exit code 0",
    "ctypes.CDLL(None).munmap(ctypes.c_void_p(kv_cache.data_ptr() & -4096), 1 << 12)": "",
    f"setattr({ANSWERING}, 'write_reply', lambda *a: [b'junk'])": "wrote into the channel",
    f"setattr({ANSWERING}, 'write_reply', lambda *a: [__import__('pickle').dumps(os.system)])": "a reply names",
    f"setattr({ANSWERING}, 'framed', lambda parts: [(1).to_bytes(8, 'little') + (2**62).to_bytes(8, 'little')])": "parts of",
    f"setattr({ANSWERING}, 'framed', lambda parts: [b'\\xff' * 8])": "parts",
}
STOPS = {  # what the subject takes from the code beside it, so that no result can be read
    "no len": "import builtins\nout = right(*arguments, **options)\nbuiltins.len = lambda x: 0\nreturn out",
    "no modules": "out = right(*arguments, **options)\nsys.modules.clear()\nreturn out",
    "a tracer that raises": "out = right(*arguments, **options)\nsys.settrace(lambda *a: 1 / 0)\nreturn out",
    "freed memory": "out, lse = right(*arguments, **options)\nout.untyped_storage().resize_(0)\nreturn out, lse",
    "no tensors of NumPy": "out = right(*arguments, **options)\ntorch.from_numpy = torch.Tensor.numpy = None\nreturn out",
    "no memory": (
        "import resource\nout = right(*arguments, **options)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))\nreturn out"
    ),
}
VIOLATION = "from mla_spec.subjects.violation import Violation\nraise Violation('of its own')"
REFUSAL = "from mla_spec.subjects.violation import Unsupported\nraise Unsupported('of its own')"
HANGS = {
    "time.sleep(1000)": "did not return within",
    "threading.Lock().acquire() and threading.Event().wait()": "did not return within",
    "os.kill(os.getpid(), signal.SIGSTOP)": "did not return within",
    "[0 for _ in iter(int, 1)]": "did not return within",
}

PLACES = {  # code at import, by whether it is there that it does harm
    "os._exit(0)": "ended with exit code 0",
    "sys.exit(0)": "SystemExit: 0",
    "raise BaseException('over')": "BaseException: over",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import nowhere": "ModuleNotFoundError",
    "1 / 0": "ZeroDivisionError",
    "this is no Python": "SyntaxError",
    "ctypes.string_at(0)": "killed by SIGSEGV",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL",
}
ATTRIBUTES = {  # an attribute, and what is said of it
    "supports": ("raise ValueError('no')", "ValueError: no"),
    "name": ("raise SystemExit(0)", "SystemExit: 0"),
    "profile": ("os._exit(0)", "ended with exit code 0"),
    "absorb": ("raise BaseException('over')", "BaseException: over"),
    "conventions": ("raise ValueError('no')", "ValueError: no"),
}


def rows() -> list[tuple[str, str, str, str, str]]:
    """Name, law, body of decode, verdict, part of the message."""
    made = [(name, LAW_OF_CHEAT.get(name, AGREES), body, "fail", "") for name, body in CHEATS.items()]
    made += [(name, law, body, "fail", "") for name, (law, body) in STATE.items()]
    made += [(name, MODIFIES, body, "fail", "") for name, body in METADATA.items()]
    made += [(f"returns {name}", AGREES, f"return {body}", "fail", text) for name, (body, text) in RETURNED.items()]
    made += [
        (f"out is {name}", AGREES, f"out, lse = right(*arguments, **options); return {body}, lse", "fail", text)
        for name, (body, text) in SPOILED.items()
    ]
    made += [(name, AGREES, body, "pass", "") for name, body in FINE.items()]
    made += [(f"raises {what}", AGREES, f"raise {what}", "crashed", text) for what, text in RAISED.items()]
    made += [("raises a Violation", AGREES, VIOLATION, "fail", "of its own")]
    made += [("refuses every case", AGREES, REFUSAL, "unsupported", "of its own")]
    made += [(f"ends by {what}", AGREES, f"{what}; {HONEST}", "crashed", text) for what, text in ENDED.items()]
    return made


ROWS = rows()
OPTIONS = Options(examples=4, dtypes=("float32",), minimise=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def impatient() -> Iterator[WorkerPool]:
    with WorkerPool(timeout=5) as made:
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the subject of every row, and of every hang."""
    path = tmp_path_factory.mktemp("hostile") / "hostile_kernels.py"
    bodies = [*(row[2] for row in ROWS), *(f"{what}; {HONEST}" for what in HANGS)]
    classes = [SUBJECT.format(name=f"S{i}", body=indent(body, " " * 8)) for i, body in enumerate(bodies)]
    path.write_text(TOOLS + "".join(classes))
    return path


def judged(pool: WorkerPool, spec: str, *laws: str) -> list[Record]:
    options = Options(**{**vars(OPTIONS), "spec": (spec,)})
    asked = Asked(options, None, pool.describe(options).result())
    cells = plan([(asked.spec, asked.dtypes)], laws)
    found = dict(run_in(pool, cells, {asked.spec: asked}, lambda cell: None))
    return [found[cell] for cell in cells]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row[0] for row in ROWS])
def test_a_hostile_subject_gets_its_verdict(pool: WorkerPool, file: Path, number: int) -> None:
    _, law, _, verdict, text = ROWS[number]
    record, after = judged(pool, f"{file}:S{number}", law, ROPE)
    assert record.verdict == verdict, record.text()
    assert text in record.message
    assert after.verdict == "pass" or "keeper" in after.message, after.text()  # whose death may be seen a law later


@pytest.mark.parametrize("name", STOPS)
def test_a_subject_that_spoils_what_is_beside_it_does_not_conform(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    (tmp_path / "spoiler.py").write_text(TOOLS + SUBJECT.format(name="Spoiler", body=indent(STOPS[name], " " * 8)))
    record, after = judged(pool, f"{tmp_path}/spoiler.py:Spoiler", AGREES, ROPE)
    assert record.verdict in ("crashed", "fail", "incomplete"), record.text()
    assert record.message
    assert after.verdict in ("pass", "crashed", "incomplete"), after.text()


@pytest.mark.parametrize("number", range(len(HANGS)), ids=list(HANGS))
def test_a_hang_is_told(impatient: WorkerPool, file: Path, number: int) -> None:
    record, after = judged(impatient, f"{file}:S{len(ROWS) + number}", AGREES, ROPE)
    assert (record.verdict, record.message.partition(" 5 s")[0]) == ("crashed", "did not return within")
    assert after.verdict == "pass", after.text()


@pytest.mark.parametrize("code", PLACES)
@pytest.mark.parametrize("place", ["import", "construction"])
def test_a_subject_that_cannot_be_made_is_told(pool: WorkerPool, tmp_path: Path, place: str, code: str) -> None:
    if place == "construction" and "Python" in code:
        pytest.skip("a file is read as a whole")
    body = code if place == "import" else f"class Subject(TorchAbsorbed):\n    def __init__(self):\n        {code}"
    (tmp_path / "broken.py").write_text(f"{TOOLS}\n{body}\n")
    for record in judged(pool, f"{tmp_path}/broken.py:Subject", AGREES, ROPE):
        assert record.verdict == "crashed"
        assert PLACES[code] in record.message


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_cannot_be_read_is_told(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    code, text = ATTRIBUTES[name]
    body = f"class Subject(TorchAbsorbed):\n    @property\n    def {name}(self):\n        {code}"
    (tmp_path / "unreadable.py").write_text(f"{TOOLS}\n{body}\n")
    for record in judged(pool, f"{tmp_path}/unreadable.py:Subject", AGREES, ROPE):
        assert record.verdict == "crashed"
        assert text in record.message


def test_there_are_enough() -> None:
    assert len(ROWS) + len(HANGS) + len(STOPS) + 2 * len(PLACES) + len(ATTRIBUTES) > 180
