import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.nn import HSTU, HSTUConfig, SASRec, SASRecConfig
from jaxrec.nn.layers import ItemEmbedding

IDS = np.array([[0, 0, 0], [1, 2, 0], [2, 0, 0], [0, 0, 0], [3, 1, 2]], np.int32)


def embedding(ids=IDS):
    return ItemEmbedding(
        4, 6, rngs=nnx.Rngs(0), num_attributes=3, attribute_slots=3, attribute_ids=ids
    )


def test_a_row_is_the_items_own_plus_the_mean_of_its_attributes():
    items = embedding()
    assert items.attribute_table is not None
    own, attributes = np.asarray(items.table[...]), np.asarray(items.attribute_table[...])
    expected = own.copy()
    expected[1] += (attributes[1] + attributes[2]) / 2
    expected[2] += attributes[2]
    expected[4] += attributes[1:].mean(0)
    np.testing.assert_allclose(items.rows(), expected, atol=1e-6)
    chosen = jnp.array([[4, 0], [3, 1]])
    np.testing.assert_allclose(items(chosen), expected[chosen], atol=1e-6)
    np.testing.assert_array_equal(items.rows()[0], np.zeros(6))


def test_the_gradient_reaches_attributes_but_never_padding():
    graphdef, params, rest = nnx.split(embedding(), nnx.Param, ...)

    def total(params):
        return (nnx.merge(graphdef, params, rest).rows() * jnp.arange(5.0)[:, None]).sum()

    gradient = jax.jit(jax.grad(total))(params)["attribute_table"][...]
    np.testing.assert_allclose(gradient[:, 0], [0, 0.5 + 4 / 3, 0.5 + 2 + 4 / 3, 4 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "ids", [IDS[:3], IDS[:, :2], np.where(IDS == 3, 4, IDS), np.where(IDS == 3, -1, IDS)]
)
def test_ids_that_do_not_fit_are_refused(ids):
    with pytest.raises(ValueError, match=r"expected shape \(5, 3\) and values 0 to 3"):
        embedding(ids)


@pytest.mark.parametrize(("model", "config"), [(SASRec, SASRecConfig), (HSTU, HSTUConfig)])
def test_models_score_items_by_rows_with_attributes(model, config):
    built = model(
        config(num_items=4, width=8, max_len=6, num_attributes=3, attribute_slots=3),
        rngs=nnx.Rngs(0),
        attribute_ids=IDS,
    )
    np.testing.assert_array_equal(built.item_embeddings(), built.items.rows())
    assert built.item_embeddings().shape == (5, 8)
    own = built.items.table[...]
    assert not np.allclose(built.item_embeddings()[1], own[1])
    np.testing.assert_array_equal(built.item_embeddings()[3], own[3])
