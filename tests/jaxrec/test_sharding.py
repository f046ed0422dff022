import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.sharding import abstract_like, make_mesh, replicated, sharded_rows


def test_mesh_has_the_named_axes_over_all_devices():
    mesh = make_mesh({"data": 4, "model": 2})
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_smaller_mesh_takes_the_first_devices():
    mesh = make_mesh({"data": 3})
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2]
    chosen = make_mesh({"data": 2}, devices=jax.devices()[5:])
    assert [device.id for device in chosen.devices.flat] == [5, 6]


def test_too_few_devices_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"data=4 × model=4 needs 16 devices, but there are 8"):
        make_mesh({"data": 4, "model": 4})


@pytest.mark.parametrize("axes", [{}, {"data": 0}])
def test_empty_axes_are_refused(axes):
    with pytest.raises(ValueError, match="expected at least one axis"):
        make_mesh(axes)


def test_rows_are_split_and_replicas_are_whole():
    mesh, x = make_mesh({"data": 4}), jnp.arange(24.0).reshape(8, 3)
    split = jax.device_put(x, sharded_rows(mesh, "data"))
    assert [shard.data.shape for shard in split.addressable_shards] == [(2, 3)] * 4
    whole = jax.device_put(x, replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(8, 3)] * 4
    np.testing.assert_array_equal(jax.jit(jnp.add)(split, x), 2 * x)  # unplaced inputs are fine


def test_unknown_axis_is_an_error():
    with pytest.raises(ValueError, match="no axis 'model'; it has data"):
        sharded_rows(make_mesh({"data": 2}), "model")


def test_abstract_like_keeps_shapes_and_places_every_leaf():
    mesh = make_mesh({"data": 2})
    tree = {"table": jnp.zeros((4, 2), jnp.bfloat16), "step": jnp.zeros((), jnp.int32)}
    same = abstract_like(tree, replicated(mesh))
    assert same["table"].shape == (4, 2)
    assert same["table"].dtype == jnp.bfloat16
    assert same["step"].sharding == replicated(mesh)
    each = abstract_like(tree, lambda x: sharded_rows(mesh, "data") if x.ndim else replicated(mesh))
    assert each["table"].sharding == sharded_rows(mesh, "data")
    assert each["step"].sharding == replicated(mesh)
