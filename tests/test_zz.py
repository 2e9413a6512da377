import torch, pytest
from hypothesis import given, strategies as st, settings
@given(st.integers())
def test_a(device, i):
    assert torch.empty(3).isnan().all()
    print(settings().max_examples, device, torch.get_num_threads())
@pytest.mark.gpu
def test_g(): pass
