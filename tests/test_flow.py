"""Flow matching in two dimensions: diffusers' schedulers for it as oracles (docs/equations.md, note 18)."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from test_splam import points, seeded

import distill
import teacher
from improved import StraightPath
from splam import ConsistencyFunction, boundary, few_step_sample, multiple_estimation, sub_path_point
from teacher import load

PATH = StraightPath(1000)


@pytest.fixture
def ideal(tmp_path):
    return teacher.new_model(teacher.parse(["--data", "flow:8gaussians", "--output_dir", str(tmp_path / "ideal")]))


def test_a_solver_step_is_eulers_for_the_velocity(ideal):
    """From noise without any signal on, where x_0 is a limit: the mean of the data."""
    x, t = points(seed=0), torch.full((64,), 999)
    ours = multiple_estimation(lambda x, t: ideal.predict(x, t, {}), PATH, x, t, t - 500, 500, 100)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    for time in stock.timesteps[:5]:
        x0, eps = ideal.predict(x, (time - 1).long().expand(64), {})
        x = stock.step(eps - x0, time, x).prev_sample
    assert torch.allclose(ours, x, atol=1e-5)
    assert ideal.predict(points(seed=1), t, {})[0].abs().max() < 0.01  # the mean of eight Gaussians on a circle


def test_a_student_samples_as_stock_diffusers_does(ideal):
    network = ideal.copy_network().eval()
    torch.nn.init.normal_(network.last.weight, std=0.1)
    student, times, noise = ConsistencyFunction(network, PATH, "flow"), [999, 499, 259], points(seed=2)
    ours_draws, stock_draws = seeded(5), seeded(5)
    *_, ours = few_step_sample(student, PATH, noise, times, lambda: torch.randn(64, 2, generator=ours_draws))
    stock, x = FlowMatchLCMScheduler(), noise
    stock.set_timesteps(sigmas=[1.0, 0.5, 0.26])
    for index, time in enumerate(stock.timesteps):
        t = torch.full((64,), times[index])
        v, (c_skip, c_out) = network(x, t).sample, boundary(t, 2)
        # The boundary is LCM's, which stock diffusers leaves out here; at these times it is 1 to rounding.
        assert c_skip.max() < 1e-5 and (1 - c_out).abs().max() < 1e-5
        x = stock.step(v, time, x, generator=stock_draws).prev_sample
    assert torch.allclose(ours, x, atol=1e-4)


def test_dl_stays_on_the_path_and_sl_lies_on_the_same_chord():
    x_t, x_s, gamma = points(seed=3), points(seed=4), torch.linspace(0.1, 1, 64)
    t = torch.full((64,), 899)
    dl, sl = (sub_path_point(x_t, x_s, t, t - 100, gamma, PATH, ode, "linear") for ode in ("dl", "sl"))
    assert torch.allclose(dl.alpha + dl.sigma, torch.ones(64, 1)) and (sl.alpha + sl.sigma).max() <= 1
    # The same chord in z = x/α: DL's place γ is SL's at γ r / (1 - γ + γ r).
    r = 0.1 / 0.2
    there = sub_path_point(x_t, x_s, t, t - 100, gamma * r / (1 - gamma + gamma * r), PATH, "sl", "linear")
    assert torch.allclose(dl.x / dl.alpha, there.x / there.alpha, atol=1e-5)
    first = sub_path_point(x_t, x_s, torch.full((64,), 999), t, gamma, PATH, "sl", "linear")
    assert torch.allclose(first.x, gamma[:, None] * x_t) and not first.alpha.any()  # nothing of x_s


def test_a_student_of_flow_matching_is_trained_saved_and_loaded(tmp_path, call, monkeypatch):
    monkeypatch.setattr(teacher.PointModel, "many_steps", 10)
    quick = teacher.RECIPES["points"] + " --max_train_steps 2 --lr_warmup_steps 0"
    monkeypatch.setitem(teacher.RECIPES, "points", quick)
    flags = "--max_train_steps 3 --lr_warmup_steps 0 --train_batch_size 64 --num_eval_samples 0".split()
    start = ["--pretrained_teacher_model", "flow:moons", *flags, "--output_dir", tmp_path / "out"]
    status, _, err = call(distill.main, *start, "--ode", "dl")
    assert status == 0, err
    student = load(str(tmp_path / "out"))
    assert student.is_student and student.prediction_type == "flow" and student.default_data == "flow:moons"
    assert isinstance(student.scheduler, FlowMatchLCMScheduler) and torch.equal(student.schedule.sigma, PATH.sigma)
    before, after = load(str(tmp_path / "out/teacher")).network.state_dict(), student.network.state_dict()
    assert all((after[name] - weight).abs().max() > 1e-5 for name, weight in before.items())
    for more, words in (
        (["--improved", "time", "--ode", "lcm"], "α² + σ² = 1"),
        (["--num_ddim_timesteps", 25], "is 50 for flow"),
    ):
        status, _, err = call(distill.main, *start[:-1], tmp_path / "other", *more)
        assert status == 2 and words in err and not (tmp_path / "other").exists()
