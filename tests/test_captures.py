"""Captured functions of tensors: what they refer to may change, and what no graph can do is left to them."""

import functools
import itertools
import random
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from pyrovae.programs.graphs import Capture, CaptureWarning, NotCaptured
from pyrovae.programs.graphs.comparisons import compare
from pyrovae.programs.graphs.noise import Noise
from pyrovae.runtime.random_states import preserved_random_states, random_states, set_random_states
from tests.test_graphs import traced

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks draw from Python's random module

Box = types.SimpleNamespace
SCALE, TABLE = 1.0, {"a": [1.0, {"b": 1.0}]}


@pytest.fixture(autouse=True)
def _on_probation():
    """Falling back is an error, where a test does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


def runs(make: Callable, calls: int, change_at: int | None = None, backend=traced):
    """The results of a program as it is and captured, at the same numbers, with a change before one call.

    Args:
        make: Gives the program, and what changes something that it refers to.
    """
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        program, change = make()
        run = Capture(program, backend=backend) if captured else program
        results = []
        for call in range(1, calls + 1):
            if call == change_at:
                change()
            results.append(run(torch.randn(3))[0])
        found.append(results)
    return *found, run


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[bool]:
    pairs = zip(got, expected, strict=True)
    return [a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True) for a, b in pairs]


def of_closure():
    scale = 1.0

    def change():
        nonlocal scale
        scale = 2.0

    return lambda x: (x * scale,), change


def of_global():
    def change():
        global SCALE
        SCALE = 2.0

    globals()["SCALE"] = 1.0
    return lambda x: (x * SCALE,), change


def of_nested_containers():
    TABLE["a"][1]["b"] = 1.0
    return lambda x: (x * TABLE["a"][1]["b"],), lambda: TABLE["a"][1].update(b=2.0)


class Program:
    """A program that is a method, with settings of every sort."""

    of_class, shadowed = 1.0, 1.0

    def __init__(self):
        self.scale, self._hidden = 1.0, 1.0

    @property
    def hidden(self):
        return self._hidden

    def by_attribute(self, x):
        return (x * self.scale,)

    def by_class(self, x):
        return (x * self.of_class,)

    def by_shadow(self, x):
        return (x * self.shadowed,)

    def by_property(self, x):
        return (x * self.hidden,)

    def by_getattr(self, x):
        return (x * getattr(self, "scale"),)  # noqa: B009 - as some programs do

    def by_helper(self, x):
        return (scaled(self, x),)


def scaled(program, x):
    return x * program.scale


def of_object(method: str, attribute: str):
    def make():
        program = type("Subclass", (Program,), {})()
        owner = type(program) if attribute == "of_class" else program
        return getattr(program, method), lambda: setattr(owner, attribute, 2.0)

    return make


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0

    def run(self, x):
        return (x * self.scale,)


@dataclass
class Settings:
    scale: float = 1.0


def of_slots():
    program = Slotted()
    return program.run, lambda: setattr(program, "scale", 2.0)


def of_dataclass():
    settings = Settings()
    return lambda x: (x * settings.scale,), lambda: setattr(settings, "scale", 2.0)


def of_partial():
    settings = {"scale": 1.0}
    return functools.partial(lambda x, s: (x * s["scale"],), s=settings), lambda: settings.update(scale=2.0)


def of_function():
    def run(x):
        return (x * run.scale,)

    run.scale = 1.0
    return run, lambda: setattr(run, "scale", 2.0)


def of_helper():
    box = Box(act=torch.sin)
    return lambda x: (box.act(x),), lambda: setattr(box, "act", torch.cos)


def of_array():
    array = np.ones(3)
    return lambda x: (x * torch.tensor(array.tolist()),), lambda: array.fill(2.0)


def of_length():
    layers = [1.0]
    return lambda x: (x * len(layers),), lambda: layers.append(1.0)


def of_tensor():
    box = Box(scale=torch.ones(3))
    return lambda x: (x * box.scale,), lambda: setattr(box, "scale", torch.full((3,), 2.0))


def of_type():
    scale = torch.ones(3)
    held = (scale,)
    return lambda x: (x * held[0],), lambda: setattr(scale, "data", torch.full((3,), 2.0, dtype=torch.float64))


def of_shape():
    scale = torch.ones(3)
    return lambda x: (x * scale.sum(),), lambda: scale.resize_(2)


def of_layout():
    square = torch.arange(9.0).reshape(3, 3)
    return lambda x: (x @ square,), lambda: square.t_()


def of_mode():
    nets = [nn.Dropout(0.5)]
    return lambda x: (nets[0](x),), nets[0].eval


def of_module():
    nets = {"a": nn.Softplus()}
    return lambda x: (nets["a"](x),), lambda: nets.update(a=nn.Tanh())


def of_forward_hook():
    net = nn.Tanh()
    return lambda x: (net(x),), lambda: net.register_forward_hook(lambda module, inputs, output: output * 2)


def of_hidden_module():
    nets = itertools.repeat(nn.Dropout(0.5))  # whose items no walk finds
    return lambda x: (next(nets)(x),), next(nets).eval


def of_default_type():
    def run(x):
        return (x.double() + torch.full((3,), 1 / 3).double(),)

    torch.set_default_dtype(torch.float32)
    return run, lambda: torch.set_default_dtype(torch.float64)


def of_sign_of_zero():
    box = Box(zero=0.0)
    return lambda x: ((x.abs() + 1) / torch.tensor(box.zero),), lambda: setattr(box, "zero", -0.0)


def of_integer_type():
    box = Box(scale=2)
    return lambda x: ((10 * x).int() * box.scale,), lambda: setattr(box, "scale", 2.0)


CHANGES = {
    "closure": of_closure,
    "global": of_global,
    "nested containers": of_nested_containers,
    "attribute": of_object("by_attribute", "scale"),
    "attribute of a class": of_object("by_class", "of_class"),
    "attribute in place of a class's": of_object("by_shadow", "shadowed"),
    "property": of_object("by_property", "_hidden"),
    "getattr": of_object("by_getattr", "scale"),
    "helper": of_object("by_helper", "scale"),
    "slots": of_slots,
    "dataclass": of_dataclass,
    "partial": of_partial,
    "attribute of a function": of_function,
    "exchanged function": of_helper,
    "numpy array": of_array,
    "length of a list": of_length,
    "exchanged tensor": of_tensor,
    "type of a tensor": of_type,
    "shape of a tensor": of_shape,
    "layout of a tensor": of_layout,
    "mode of a module": of_mode,
    "exchanged module": of_module,
    "hook of a module": of_forward_hook,
    "module that no walk finds": of_hidden_module,
    "default type": of_default_type,
    "sign of zero": of_sign_of_zero,
    "integer for float": of_integer_type,
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_what_changes_gets_a_graph_of_its_own(make):
    try:
        expected, got, capture = runs(make, calls=8, change_at=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(equal(got, expected))
    assert not all(equal([expected[4].to(expected[2].dtype)], [expected[2]]))
    assert len(capture.graphs) == 2
    assert capture.reason == ""


def test_a_setting_that_returns_returns_to_its_graph():
    box = Box(scale=1.0)
    run = Capture(lambda x: (x * box.scale,), backend=traced)
    for scale in (1.0, 2.0, 3.0, 1.0, 2.0):
        box.scale = scale + 1e-300  # of an equal value, not the same object
        assert run(torch.ones(1))[0] == scale
    assert len(run.graphs) == 3


def test_graphs_are_kept_apart_by_arguments_that_look_alike():
    run = Capture(lambda x, s, t=None: (x / s if t is None else x * t,), backend=traced)
    one = torch.ones(1)
    for s, t, expected in [(0.0, None, 1), (-0.0, None, -1), (0.0, None, 1)]:
        assert run(one, s, t)[0] * 0 != 0
        assert run(one, s, t)[0].sign() == expected
    assert run(one, 2, t=3.0)[0] == 3
    assert run(one, t=4.0, s=2)[0] == 4
    assert run(one, s=2, t=torch.tensor(5.0))[0] == 5


def draws_numpy():
    return lambda x: (x + float(np.random.randn()),)


def draws_python():
    return lambda x: (x + random.gauss(0, 1),)


def draws_from(generator, draw):
    return lambda x: (x + draw(generator),)


DRAWS = {
    "numpy's random module": draws_numpy,
    "Python's random module": draws_python,
    "a numpy generator of its own": lambda: draws_from(np.random.default_rng(0), lambda g: g.normal()),
    "a random generator of its own": lambda: draws_from(random.Random(0), lambda g: g.random()),
    "a torch.Generator of its own": lambda: draws_from(
        torch.Generator().manual_seed(0), lambda g: torch.randn(3, generator=g)
    ),
}


@pytest.mark.parametrize("source", DRAWS)
def test_noise_that_a_graph_does_not_draw_leaves_the_program_uncompiled(source):
    with pytest.warns(
        CaptureWarning, match=f"runs uncompiled: it draws from {source}: draw from PyTorch"
    ) as warned:
        expected, got, capture = runs(lambda: (DRAWS[source](), None), calls=5)
    assert all(equal(got, expected))
    assert len(expected) == len({result[0].item() for result in expected})
    assert len(warned) == 1
    assert capture.graphs == {}


def test_noise_that_comes_late_leaves_the_program_uncompiled():
    def make():
        runs, box = itertools.count(), Box(mean=float(np.random.randn()))
        return lambda x: (x + (float(np.random.randn()) if next(runs) > 4 else box.mean),), None

    with pytest.warns(CaptureWarning, match="it draws from numpy's random module"):
        *_, capture = runs(make, calls=8)
    assert capture.reason


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "numpy"])
def test_draws_that_make_no_difference_are_no_obstacle(draw):
    expected, got, capture = runs(lambda: (lambda x: (draw(), x + torch.rand(3))[1:], None), calls=5)
    assert all(equal(got, expected))
    assert capture.reason == ""


def counts_attribute():
    box = Box(calls=0)

    def run(x):
        box.calls += 1
        return (x * box.calls,)

    return run


def counts_nonlocal():
    calls = 0

    def run(x):
        nonlocal calls
        calls += 1
        return (x * calls,)

    return run


def counts_in_a_list():
    calls = []

    def run(x):
        calls.append(1)
        return (x * len(calls),)

    return run


class Counting:
    def __init__(self):
        self._calls, self.last = 0, None
        self.mean = torch.zeros(3)

    def in_private(self, x):
        self._calls += 1
        return (x * self._calls,)

    def shows(self, x):
        self.last = 2 * x
        return (x + 1,)

    def averages(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x
        return (x - self.mean,)


EFFECTS = {
    "'calls' of SimpleNamespace": counts_attribute,
    "'calls' in a closure": counts_nonlocal,
    "'calls' in a closure when": counts_in_a_list,
    "'_calls' of Counting": lambda: Counting().in_private,
    "'last' of Counting": lambda: Counting().shows,
    "'mean' of Counting": lambda: Counting().averages,
}


@pytest.mark.parametrize("place", EFFECTS)
def test_a_program_that_changes_more_than_tensors_runs_uncompiled(place):
    with pytest.warns(CaptureWarning, match=f"it changes {place}.*: change a tensor in place") as warned:
        expected, got, capture = runs(lambda: (EFFECTS[place](), None), calls=5)
    assert all(equal(got, expected))
    assert len(warned) == 1
    assert capture.graphs == {}


def test_what_is_changed_in_place_is_changed_once_a_call():
    def make():
        mean = torch.zeros(3)
        return lambda x: (x - mean.mul_(0.9).add_(0.1 * x),), None

    expected, got, capture = runs(make, calls=9)
    assert all(equal(got, expected))
    assert capture.reason == ""


class Caching:
    """Keeps what it computed, in private, and makes a table when it is first run."""

    def __init__(self):
        self.table, self._cache, self.memory = None, None, {}

    def run(self, x):
        if self.table is None:
            self.table = torch.arange(3.0)
        if "shift" not in self.memory:
            self.memory["shift"] = torch.ones(3)
        self._cache = 2 * x
        return (x * self.table - self._cache + self.memory["shift"],)


def test_caches_and_what_is_made_in_the_first_run_are_no_obstacle():
    programs = []

    def make():
        programs.append(Caching())
        return programs[-1].run, None

    expected, got, capture = runs(make, calls=6)
    assert all(equal(got, expected))
    assert capture.reason == ""
    assert len(capture.graphs) == 1
    for program in programs:  # tensors of the trace, which hold no numbers, are gone
        assert [type(value) for value in (program.table, program._cache)] == [torch.Tensor] * 2
        assert program.table.tolist() == [0, 1, 2]


def test_a_running_mean_that_is_exchanged_in_private_is_found_out():
    class Averaging:
        def __init__(self):
            self._mean = torch.zeros(3)

        def run(self, x):
            self._mean = 0.9 * self._mean + 0.1 * x
            return (x - self._mean,)

    with pytest.warns(CaptureWarning, match="result 0 of its graph is off"):
        expected, got, _ = runs(lambda: (Averaging().run, None), calls=6)
    assert all(equal(got, expected))


def unseen():
    """A setting that is reached in a way that cannot be read in the code."""
    box = Box(scale=1.0)
    return lambda x: (x * vars(box)["scale"],), lambda: setattr(box, "scale", 2.0)


@pytest.mark.parametrize(("change_at", "right_from"), [(2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_what_changes_unseen_is_found_out_whenever_the_calls_have_doubled(change_at, right_from):
    """A call with another result takes the program's, and the next one decides."""
    words = "" if change_at == 2 else f", at call {right_from + 1}: something that is not watched has changed"
    with pytest.warns(CaptureWarning, match=f"where the largest number is .*{words}$") as warned:
        expected, got, capture = runs(unseen, calls=20, change_at=change_at)
    stale = range(change_at, right_from)
    assert equal(got, expected) == [call not in stale for call in range(1, 21)]
    assert len(warned) == 1
    assert capture.reason


def counting():
    """A program, and how often it has been run."""
    counter = itertools.count()
    program = Box(runs=lambda: counter.__reduce__()[1][0])
    return lambda x: (next(counter), x + 1)[1:], program.runs


def test_a_graph_is_compared_at_calls_one_two_four_eight_and_so_on():
    program, runs = counting()
    capture, when = Capture(program, backend=traced), []
    capture(torch.ones(1))
    for call in range(2, 40):
        before = runs()
        capture(torch.ones(1))
        when += [call] * (runs() - before)
    assert when == [2, 4, 8, 16, 32]


def test_a_comparison_can_be_asked_for():
    program, runs = counting()
    capture = Capture(program, backend=traced)
    for _ in range(5):
        capture(torch.ones(1))
    before, capture.due = runs(), True
    for _ in range(2):
        capture(torch.ones(1))
    assert runs() == before + 1


def off_at(calls: set[int], factor: float):
    """A backend whose graph is off by a factor, at these calls."""

    def backend(graph, inputs):
        counter = itertools.count(1)

        def run(*tensors):
            off = next(counter) in calls
            return [result * factor if off else result for result in graph(*tensors)]

        return run

    return backend


def test_a_result_that_is_off_once_is_no_reason_to_fall_back():
    """Rounding may decide a draw: that call takes the program's result."""
    expected, got, capture = runs(lambda: (lambda x: (x + 1,), None), calls=9, backend=off_at({4, 8}, 1.5))
    assert all(equal(got, expected))
    assert capture.reason == ""


@pytest.mark.parametrize(
    ("calls", "off", "falls_back"),
    [({1}, 5e-5, False), ({1}, 2e-4, True), ({4, 5}, 5e-4, False), ({4, 5}, 2e-3, True)],
)
def test_later_comparisons_allow_for_more_rounding(calls, off, falls_back):
    run = Capture(lambda x: (x + 1,), backend=off_at(calls, 1 + off))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        for _ in range(6):
            run(torch.ones(3))
    assert bool(run.reason) is falls_back


def test_a_graph_that_differs_leaves_the_state_and_the_noise_that_the_program_leaves():
    def make():
        total = torch.zeros(3)
        return lambda x: (total.add_(x + torch.rand(3)) * 1.0,), None

    for calls in ({1}, {2}, {4, 5}):
        with pytest.warns(CaptureWarning, match="off by"):
            expected, got, _ = runs(make, calls=7, backend=off_at(calls, 1.5))
        assert all(equal(got, expected)), calls


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
@pytest.mark.parametrize("part", [0.5, 2.0])
def test_a_graph_may_be_off_as_far_as_its_coarsest_numbers_round(dtype, tolerance, part):
    def program(x):
        return (x + 0 * x.to(dtype),)

    def backend(graph, inputs):
        return lambda x: [result + torch.tensor([part * tolerance, 0, 0]).double() for result in graph(x)]

    run = Capture(program, backend=backend)
    with pytest.warns(CaptureWarning) if part > 1 else warnings.catch_warnings():
        run(torch.tensor([0.5, 1.0, 0.0]).double())
    assert bool(run.reason) is (part > 1)


def test_small_results_are_judged_beside_large_ones_and_leading_ones_apart():
    """A result may be off by a tenth of the tolerance of the overall maximum; a leading one only of its own."""
    large, small, off = torch.tensor([10.0]), torch.tensor([1e-6]), torch.tensor([9e-5 + 1e-6])
    compare([large, off], [large, small], 1e-4)
    with pytest.raises(NotCaptured, match=r"result 1 of its graph is off by 9\.0e-05"):
        compare([large / 2, off], [large / 2, small], 1e-4)
    with pytest.raises(NotCaptured, match="result 0"):
        compare([off], [small], 1e-4)


def test_integers_are_to_be_equal():
    compare([torch.tensor([3])], [torch.tensor([3])], 1.0)
    with pytest.raises(NotCaptured, match=r"off by 1\.0e\+00"):
        compare([torch.tensor([4])], [torch.tensor([3])], 1.0)


def test_empty_and_infinite_results_count_as_equal():
    compare([torch.ones(0)], [torch.ones(0)], 1e-4)
    compare([torch.ones(1)], [torch.full((1,), torch.inf)], 1e-4)


class Gpus:
    """Two GPUs that have nothing but random states."""

    def __init__(self, monkeypatch):
        self.states = {gpu: np.array([gpu, 0]) for gpu in range(2)}
        for name, replacement in {
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "get_rng_state": lambda gpu="cuda": torch.tensor(self.states[self.number(gpu)]),
            "set_rng_state": lambda state, gpu="cuda": self.set(self.number(gpu), state),
            "is_current_stream_capturing": lambda: False,
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    @staticmethod
    def number(gpu) -> int:
        return gpu if isinstance(gpu, int) else torch.device(gpu).index or 0

    def set(self, gpu: int, state) -> None:
        self.states[gpu] = state.numpy().copy()

    def draw(self, gpu: int) -> None:
        self.states[gpu] = self.states[gpu] + np.array([0, 1])

    def drawn(self) -> list[int]:
        assert [int(state[0]) for state in self.states.values()] == [0, 1]  # none has another's
        return [int(state[1]) for state in self.states.values()]


@pytest.fixture
def gpus(monkeypatch):
    return Gpus(monkeypatch)


@pytest.mark.parametrize("gpu", [0, 1])
def test_the_random_state_of_the_device_at_hand_is_saved_and_restored(gpus, gpu):
    states = random_states(torch.device("cuda", gpu))
    gpus.draw(0)
    gpus.draw(1)
    set_random_states(states, torch.device("cuda", gpu))
    assert gpus.drawn() == [int(gpu != 0), int(gpu != 1)]


def test_the_random_states_of_all_devices_are_preserved(gpus):
    with preserved_random_states():
        gpus.draw(0)
        gpus.draw(1)
        torch.rand(1), np.random.rand(), random.random()
        assert gpus.drawn() == [1, 1]
    assert gpus.drawn() == [0, 0]


def test_without_a_gpu_in_use_none_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: pytest.fail("asked"))
    with preserved_random_states():
        pass


@pytest.mark.parametrize("gpu", [0, 1])
def test_noise_of_any_device_is_compared(gpus, gpu):
    before = Noise([])
    assert before.equals(before.now())
    gpus.draw(gpu)
    assert not before.equals(before.now())
    assert before.drawn(before.now()) == []


@pytest.mark.parametrize("gpu", [0, 1])
def test_a_program_that_draws_on_a_device_where_its_graph_does_not_runs_uncompiled(gpus, gpu):
    hidden = itertools.repeat(gpus)
    run = Capture(lambda x: (next(hidden).draw(gpu), x + 1)[1:], backend=traced)
    with pytest.warns(CaptureWarning, match="its graph draws other noise"):
        run(torch.ones(1))
    assert gpus.drawn() == [int(gpu == 0), int(gpu == 1)]


def test_noise_of_somebodys_generators_is_told_and_put_back():
    generators = [
        random.Random(0),
        np.random.default_rng(0),
        np.random.RandomState(0),
        torch.Generator().manual_seed(0),
    ]
    draws = [
        lambda g: g.random(),
        lambda g: g.normal(),
        lambda g: g.normal(),
        lambda g: torch.rand(1, generator=g).item(),
    ]
    for generator, draw in zip(generators, draws, strict=True):
        before = Noise(generators)
        assert before.drawn(before.now()) == []
        first = draw(generator)
        kind = type(generator).__module__.split(".")[0]
        assert before.drawn(before.now()) == [f"a {kind} generator of its own"]
        before.restore()
        assert draw(generator) == first


def test_no_more_than_sixteen_graphs_are_made():
    run = Capture(lambda x, power: (x**power,), backend=traced)
    for power in range(16):
        run(torch.ones(1), power)
    assert len(run.graphs) == 16
    with pytest.warns(CaptureWarning, match="more than 16 kinds"):
        run(torch.ones(1), 16)


def test_what_is_no_tensor_holds_for_the_trace():
    run = Capture(lambda x: ("first", x + 1, None, 2 * x, [3]), backend=traced)
    for _ in range(4):
        one, two, three, four, five = run(torch.ones(1))
        assert (one, two, three, four, five) == ("first", 2, None, 2, [3])
