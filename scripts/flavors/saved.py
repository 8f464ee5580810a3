"""Save one small model of one flavor: `python saved.py NAME FOLDER`, with the packages that the flavor needs.

It is run by an environment of the model's own, with whatever release of MLflow that has, so nothing of this project is
imported here. In FOLDER stand then `model`, as MLflow saved it, `question.json`, what is asked of its server, and
`expected.json`, what the model answered here.
"""

# mypy: ignore-errors
# Each flavor imports its own packages, which are not there where this is checked.

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc

_SAVE: dict[str, Callable[[Path], Any]] = {}
_V1 = int(mlflow.__version__.partition(".")[0]) == 1


def _saves(save: Callable[[Path], Any]) -> Callable[[Path], Any]:
    _SAVE[save.__name__.removeprefix("_")] = save
    return save


def _table() -> Any:
    import pandas as pd

    return pd.DataFrame({"a": [0.0, 1.0, 2.0, 3.0] * 5, "b": [1.0, 0.0, 1.0, 0.0] * 5})


_TARGET = [0.0, 1.0, 2.0, 3.0] * 5


@_saves
def _sklearn(folder: Path) -> Any:
    import mlflow.sklearn
    from sklearn.linear_model import LinearRegression

    table = _table()
    mlflow.sklearn.save_model(LinearRegression().fit(table, _TARGET), str(folder), input_example=table[:2])
    return table[:2]


@_saves
def _xgboost(folder: Path) -> Any:
    import mlflow.xgboost
    from xgboost import XGBRegressor

    table = _table()
    mlflow.xgboost.save_model(XGBRegressor(n_estimators=3).fit(table, _TARGET), folder, input_example=table[:2])
    return table[:2]


@_saves
def _lightgbm(folder: Path) -> Any:
    import mlflow.lightgbm
    from lightgbm import LGBMRegressor

    table = _table()
    model = LGBMRegressor(n_estimators=3, min_child_samples=1, verbose=-1).fit(table, _TARGET)
    mlflow.lightgbm.save_model(model, folder, input_example=table[:2])
    return table[:2]


@_saves
def _catboost(folder: Path) -> Any:
    import mlflow.catboost
    from catboost import CatBoostRegressor

    table = _table()
    model = CatBoostRegressor(iterations=3, verbose=False, allow_writing_files=False).fit(table, _TARGET)
    mlflow.catboost.save_model(model, folder, input_example=table[:2])
    return table[:2]


@_saves
def _statsmodels(folder: Path) -> Any:
    import mlflow.statsmodels
    import statsmodels.api as sm

    table = _table()
    mlflow.statsmodels.save_model(sm.OLS(_TARGET, table).fit(), folder, input_example=table[:2])
    return table[:2]


@_saves
def _prophet(folder: Path) -> Any:
    import mlflow.prophet
    import pandas as pd
    from prophet import Prophet

    days = pd.date_range("2024-01-01", periods=40)
    model = Prophet(uncertainty_samples=0).fit(pd.DataFrame({"ds": days, "y": [float(day % 7) for day in range(40)]}))
    example = pd.DataFrame({"ds": days[:2].strftime("%Y-%m-%d")})
    mlflow.prophet.save_model(model, folder, input_example=example)
    return example


@_saves
def _onnx(folder: Path) -> Any:
    import mlflow.onnx
    import numpy as np
    from onnx import TensorProto, helper

    single = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", single[:1], single[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    example = np.array([[1.0, 2.0]], dtype=np.float32)
    mlflow.onnx.save_model(model, folder, input_example=example)
    return example


@_saves
def _spacy(folder: Path) -> Any:
    import mlflow.spacy
    import pandas as pd
    import spacy as library
    from spacy.training import Example

    nlp = library.blank("en")
    categories = nlp.add_pipe("textcat")
    for label in ("GOOD", "BAD"):
        categories.add_label(label)
    nlp.initialize(lambda: [Example.from_dict(nlp.make_doc("fine"), {"cats": {"GOOD": 1.0, "BAD": 0.0}})])
    example = pd.DataFrame({"text": ["a fine day"]})
    mlflow.spacy.save_model(nlp, folder, input_example=example)
    return example


@_saves
def _pytorch(folder: Path) -> Any:
    import mlflow.pytorch
    import numpy as np
    import torch

    example = np.array([[1.0, 2.0]], dtype=np.float32)
    mlflow.pytorch.save_model(torch.nn.Linear(2, 1), folder, input_example=example)
    return example


@_saves
def _tensorflow(folder: Path) -> Any:
    import mlflow.tensorflow
    import numpy as np
    import tensorflow as tf

    model = tf.keras.Sequential([tf.keras.layers.Input(shape=(2,)), tf.keras.layers.Dense(1)])
    example = np.array([[1.0, 2.0]], dtype=np.float32)
    mlflow.tensorflow.save_model(model, folder, input_example=example)
    return example


@_saves
def _transformers(folder: Path) -> Any:
    import mlflow.transformers
    import pandas as pd
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, pipeline

    words = folder.with_name("vocabulary.txt")
    words.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nfine\nday")
    tokenizer = BertTokenizerFast(vocab_file=str(words))
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    tiny = pipeline("text-classification", model=BertForSequenceClassification(config), tokenizer=tokenizer)
    mlflow.transformers.save_model(tiny, folder, input_example=["a fine day"])
    return pd.DataFrame(["a fine day"])


@_saves
def _langchain(folder: Path) -> Any:
    import mlflow.langchain

    script = folder.with_name("chain.py")
    script.write_text(
        textwrap.dedent("""\
            import mlflow
            from langchain_core.runnables import RunnableLambda

            mlflow.models.set_model(RunnableLambda(lambda words: words["text"].upper()))
            """)
    )
    mlflow.langchain.save_model(str(script), folder, input_example={"text": "hello"})
    return {"text": "hello"}


@_saves
def _from_code(folder: Path) -> Any:
    import numpy as np

    script = folder.with_name("doubled.py")
    script.write_text(
        textwrap.dedent("""\
            import mlflow


            class Doubled(mlflow.pyfunc.PythonModel):
                def predict(self, context, model_input, params=None):
                    return model_input * 2


            mlflow.models.set_model(Doubled())
            """)
    )
    example = np.array([[1.0, 2.0]])
    mlflow.pyfunc.save_model(folder, python_model=str(script), input_example=example)
    return example


@_saves
def _code_paths(folder: Path) -> Any:
    """Save a class of the author's own module, which uses what `mlflow` brings and nobody wrote down."""
    code = folder.with_name("scaling.py")
    code.write_text(
        textwrap.dedent("""\
            import mlflow.pyfunc


            class Scaled(mlflow.pyfunc.PythonModel):
                def predict(self, context, model_input, params=None):
                    from sklearn.preprocessing import scale

                    return scale(model_input)
            """)
    )
    sys.path.insert(0, str(code.parent))
    import numpy as np
    from scaling import Scaled

    # No input example: MLflow would run it, and find scikit-learn.
    mlflow.pyfunc.save_model(folder, python_model=Scaled(), code_paths=[str(code)])
    return np.array([[1.0, 2.0], [3.0, 5.0]])


def _question(example: Any) -> dict[str, Any]:
    if hasattr(example, "to_dict"):
        split = {key: value for key, value in example.to_dict(orient="split").items() if key != "index"}
        return split if _V1 else {"dataframe_split": split}
    return {"inputs": example if isinstance(example, dict) else example.tolist()}


def main(name: str, folder: Path) -> None:
    """Save a model, what to ask it, and what it answers here."""
    model = folder / "model"
    example = _SAVE[name](model)
    (folder / "question.json").write_text(json.dumps(_question(example), default=float))
    answer = mlflow.pyfunc.load_model(str(model)).predict(example)
    (folder / "expected.json").write_text(json.dumps(_plain(answer), default=float))


def _plain(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: _plain(value) for key, value in answer.items()}
    if hasattr(answer, "to_json"):
        frame = answer.to_frame() if hasattr(answer, "to_frame") else answer
        return json.loads(frame.to_json(orient="records", date_format="iso", date_unit="s"))
    return answer.tolist() if hasattr(answer, "tolist") else answer


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
