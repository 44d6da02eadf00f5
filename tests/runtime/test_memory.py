"""Memory of devices: that of a CPU within the limit of a container, and errors that mean too little memory."""

import pytest

from segjax.runtime import memory


class Device:
    platform = "cpu"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(files) lays out /proc and /sys/fs/cgroup below a folder."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_held", lambda: 50)
    monkeypatch.setattr(memory, "_physical", lambda: 9000)

    def lay_out(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return lay_out


MEMINFO = {"proc/meminfo": "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable: 7 kB\n"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 9000),
        (MEMINFO, 7168 + 50),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/job/3\n",
                "cgroup/job/3/memory.max": "3000\n",
                "cgroup/job/3/memory.current": "1200\n",
                "cgroup/job/3/memory.stat": "anon 900\ninactive_file 300\n",
            },
            2100 + 50,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "4:cpu,memory:/docker/a\n",
                "cgroup/memory/memory.limit_in_bytes": "500\n",
                "cgroup/memory/memory.usage_in_bytes": "600\n",
            },
            50,
        ),
        (MEMINFO | {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n"}, 7168 + 50),
        # SLURM: the limits are those of the job and of the step.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/slurm/job_7/step_0/user/task_0\n",
                "cgroup/slurm/job_7/memory.max": "4000\n",
                "cgroup/slurm/job_7/memory.current": "1000\n",
                "cgroup/slurm/job_7/step_0/memory.max": "3000\n",
                "cgroup/slurm/job_7/step_0/memory.current": "900\n",
                "cgroup/slurm/job_7/step_0/user/task_0/memory.max": "max\n",
                "cgroup/slurm/job_7/step_0/user/task_0/memory.current": "900\n",
            },
            2100 + 50,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "9:memory:/slurm/job_7/task_0\n1:cpu:/slurm\n",
                "cgroup/memory/slurm/job_7/memory.limit_in_bytes": "800\n",
                "cgroup/memory/slurm/job_7/memory.usage_in_bytes": "500\n",
                "cgroup/memory/slurm/job_7/task_0/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/slurm/job_7/task_0/memory.usage_in_bytes": "400\n",
            },
            300 + 50,
        ),
    ],
)
def test_a_cpu_has_the_available_memory_within_its_cgroup_limit(files, expected, machine):
    machine(files)
    assert memory.limit(Device()) == memory.host() == expected
    assert memory.limit(Device(), shared_by=2) == expected // 2


def test_the_memory_of_this_machine_is_measured():
    assert memory._held() > 1 << 20 and (memory.limit(Device()) or 1 << 30) > memory._held()


def test_only_out_of_memory_errors_are_recognised_as_such():
    assert memory.is_exhausted(MemoryError())
    assert memory.is_exhausted(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."))
    assert not memory.is_exhausted(RuntimeError("INTERNAL: memory"))


class Compiled:
    """1000 bytes of arguments, 200 of which are donated and returned, 90 of temporaries, and 300 of outputs."""

    argument_size_in_bytes, temp_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 1000, 90, 300, 200

    def memory_analysis(self):
        return self


def test_donated_arguments_are_counted_once():
    assert memory.needed(Compiled()) == 1000 + 90 + 300 - 200


def test_exceeding_the_memory_is_an_error_with_both_sizes(machine):
    machine({"proc/meminfo": "MemAvailable: 2097152 kB\n"})
    memory.refuse_too_large(2 * 2**30 + 50, [Device()], what="a crop")
    memory.refuse_too_large(None, [Device()], what="a crop")
    with pytest.raises(memory.TooLittleMemoryError, match=r"a crop needs 3.00 GiB, and the device has 2.00 GiB"):
        memory.refuse_too_large(3 * 2**30, [Device()], what="a crop")
    with pytest.raises(MemoryError, match=r"the device has 1.00 GiB"):
        memory.refuse_too_large(3 * 2**30 // 2, [Device()] * 2, what="a crop")


@pytest.mark.parametrize(
    "platform, on_device, on_host, resident, decoded",
    [
        ("cpu", None, 30e9, 2e9, 10e9),
        ("gpu", 141e9, 1200e9, 47e9, 400e9),
        ("gpu", 141e9, 60e9, 20e9, 20e9),
        ("gpu", 24e9, None, 8e9, 8e9),
        ("gpu", None, 60e9, 2e9, 20e9),
    ],
)
def test_data_may_take_a_third_of_a_gpu_and_of_the_host(monkeypatch, platform, on_device, on_host, resident, decoded):
    class Card:
        def memory_stats(self):
            return None if on_device is None else {"bytes_limit": on_device}

    device = Card()
    device.platform = platform
    monkeypatch.setattr(memory, "host", lambda: on_host)
    assert (memory.for_resident_data(device), memory.for_decoded_images()) == (resident, decoded)
