"""What bench_scheduler.py counts, on a quarter of its memory; times are for a machine of their
own."""

import pytest
from bench_scheduler import RotateKConfig, layout_of, one_image, open_slab_waste, slabs_back
from scheduler_host import Host

pytestmark = pytest.mark.usefixtures("host_configuration")
NUM_SLABS, TURN_OVERS = 1000, 2


def test_slabs_come_back_after_text_has_turned_the_memory_over():
    back, unused = slabs_back(NUM_SLABS, TURN_OVERS)
    assert back > 0.93
    assert unused < 0.1


def test_image_chats_leave_few_rows_unused():
    assert open_slab_waste(chats=8) < 0.007


def test_one_image_evicts_little_more_than_it_takes():
    layout = layout_of(NUM_SLABS)
    evicted, *_ = one_image(
        Host(layout, RotateKConfig(), num_requests=512), layout.text_slots, TURN_OVERS
    )
    assert 1000 < evicted < 2300
