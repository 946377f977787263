import kills


def test_a_run_killed_at_any_moment_ends_like_one_left_alone(tmp_path):
    found = kills.kill_many(4, seed=5, work=tmp_path, progress=False)
    assert not found["failures"]
    assert found["survived"] == found["kills"] >= 4
