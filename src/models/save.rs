//! Writes Hugging Face folders, and gives weights and gradients their names there.

use std::{
    borrow::Cow,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Head, Model, ParamKind, ParamTensor, Params,
    weights::{Places, StoredRows, WEIGHTS_FILE, sources, stored_shape, transposed},
};
use crate::{
    device::{Device, Element, Float, View, reserve},
    error::{Error, Result},
};

/// A stored tensor: its name, its shape there, and the weight that it is some rows of.
struct StoredTensor<'a> {
    name: String,
    shape: Vec<usize>,
    of: &'a ParamTensor,
    places: Places,
    rows: std::ops::Range<usize>,
    /// See [`transposed`].
    transposed: Option<usize>,
}

/// The tensors of a model as Hugging Face names and shapes them.
fn stored<T: Element>(model: &Model<T>) -> impl Iterator<Item = StoredTensor<'_>> {
    model.params().layout().tensors().iter().flat_map(move |of| {
        let transposed = transposed(model.family(), of);
        sources(model.family(), of, model.spec()).into_iter().map(move |source| {
            let StoredRows { name, rows } = source;
            let places = Places::of(model.family(), of, model.spec());
            let cols = places.cols.len();
            let shape = match of.kind {
                ParamKind::Score | ParamKind::SharedGate => vec![1, of.cols],
                _ => stored_shape(model.family(), of, rows.len(), cols),
            };
            StoredTensor { name, shape, of, places, rows, transposed }
        })
    })
}

impl StoredTensor<'_> {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its numbers in the stored order, from those of all weights.
    fn numbers<'a, F: Float>(&self, dev: &Device, flat: View<'a, F>) -> Result<Cow<'a, [F]>> {
        let Self { of, places, rows, .. } = self;
        let cols = places.cols.len();
        let all = dev.on_host(flat.range(of.offset..of.offset + of.len()))?;
        if places.plain() && self.transposed.is_none() {
            let span = rows.start * cols..rows.end * cols;
            return Ok(match all {
                Cow::Borrowed(all) => all[span].into(),
                Cow::Owned(all) => all[span].to_vec().into(),
            });
        }
        let at = |r: usize, c: usize| all[places.rows[r] * places.stride + places.cols[c]];
        // At the end of a run the run's checkpoint is there.
        let mut out = reserve("a tensor to store", self.len())?;
        match self.transposed {
            Some(stack) => {
                let high = rows.len() / stack;
                for first in rows.clone().step_by(high.max(1)) {
                    let own = first..first + high;
                    let places = (0..cols).flat_map(|c| own.clone().map(move |r| (r, c)));
                    out.extend(places.map(|(r, c)| at(r, c)));
                }
            }
            None => out.extend(
                rows.clone().flat_map(|r| (0..cols).map(move |c| (r, c))).map(|(r, c)| at(r, c)),
            ),
        }
        Ok(out.into())
    }
}

/// A tensor as Hugging Face has it: name, shape, numbers in the stored order.
pub type Named<F> = (String, Vec<usize>, Vec<F>);

/// Weights, gradients or moments under their Hugging Face names.
pub fn named<T: Element, F: Float>(
    dev: &Device,
    model: &Model<T>,
    params: &Params<F>,
) -> Result<Vec<Named<F>>> {
    let one = |s: StoredTensor<'_>| {
        let numbers = s.numbers(dev, params.flat())?.into_owned();
        Ok((s.name, s.shape, numbers))
    };
    stored(model).map(one).collect()
}

/// Weights of a model in files.
pub fn count<T: Element>(model: &Model<T>) -> usize {
    stored(model).map(|s| s.len()).sum()
}

/// The Hugging Face name of the tensor that holds element `i` of the flat weights or gradients.
pub fn tensor_at<T: Element>(model: &Model<T>, i: usize) -> Option<String> {
    let t = model.params().layout().at(i)?;
    let places = Places::of(model.family(), t, model.spec());
    let row = places.stored_row((i - t.offset) / places.stride);
    let holds = |s: &StoredRows| s.rows.contains(&row);
    sources(model.family(), t, model.spec()).into_iter().find(holds).map(|s| s.name)
}

/// Writes `config.json` and `model.safetensors` into an existing folder, in the layout that
/// `transformers` loads: a value or reward model as `AutoModelForSequenceClassification` with
/// `score.weight`.
pub fn save<T: Element>(dev: &Device, model: &Model<T>, dir: &Path) -> Result<()> {
    let path = dir.join("config.json");
    let dtype = computed::<T>();
    std::fs::write(&path, config_text(model, dtype)).map_err(Error::io("write", &path))?;
    let path = &dir.join(WEIGHTS_FILE);
    let mut file = BufWriter::new(File::create(path).map_err(Error::io("create", path))?);
    write_weights(dev, model, dtype, &mut |bytes| {
        file.write_all(bytes).map_err(Error::io("write", path))
    })?;
    file.flush().map_err(Error::io("write", path))
}

/// The dtype of the weights of [`Model::master`].
fn computed<T: Element>() -> Dtype {
    if size_of::<T::Acc>() == 4 { Dtype::F32 } else { Dtype::F64 }
}

/// Hands the bytes of [`WEIGHTS_FILE`] to `write`, weights rounded to `dtype`. One tensor at a time
/// is in host memory.
///
/// # Errors
/// [`Error::Value`] for a weight that `dtype` cannot hold.
pub fn write_weights<T: Element>(
    dev: &Device,
    model: &Model<T>,
    dtype: Dtype,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut tensors: Vec<_> = stored(model).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let (bytes, mut end) = (dtype.bitsize() / 8, 0);
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    for t in &tensors {
        let start = end;
        end += t.len() * bytes;
        let entry = json!({"dtype": dtype, "shape": t.shape, "data_offsets": [start, end]});
        header.insert(t.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for t in &tensors {
        let numbers = t.numbers(dev, model.master()?)?;
        if dtype == computed::<T>() {
            write(bytemuck::cast_slice(&numbers))?;
            continue;
        }
        for part in numbers.chunks(1 << 16) {
            let all = part.iter().map(|x| x.f64());
            let rounded: Vec<u8> = match dtype {
                Dtype::BF16 => all.flat_map(|x| <bf16 as Element>::of(x).to_le_bytes()).collect(),
                Dtype::F16 => {
                    let half = |x: f64| f16::from_f32(x as f32);
                    if let Some(x) = part.iter().find(|x| half(x.f64()).is_infinite()) {
                        let what = format!("a weight of `{}` in float16", t.name);
                        return Err(Error::value(what, "at most 65504", x));
                    }
                    all.flat_map(|x| half(x).to_le_bytes()).collect()
                }
                Dtype::F32 => all.flat_map(|x| (x as f32).to_le_bytes()).collect(),
                other => {
                    let want = "F32, BF16, F16 or that of the weights";
                    return Err(Error::value("dtype to store", want, format!("{other:?}")));
                }
            };
            write(&rounded)?;
        }
    }
    Ok(())
}

/// The text of the model's `config.json`.
pub fn config_text<T: Element>(model: &Model<T>, dtype: Dtype) -> String {
    format!("{:#}\n", Value::Object(config(model, dtype)))
}

/// The loaded `config.json` with head and dtype as they are now.
fn config<T: Element>(model: &Model<T>, dtype: Dtype) -> Map<String, Value> {
    let mut json = model.config().json().clone();
    let architecture = match model.head() {
        Head::Lm => model.family().causal_lm,
        Head::Scalar => model.family().sequence_classification,
    };
    json.insert("architectures".into(), json!([architecture]));
    // "torch_dtype" up to transformers 4, "dtype" from 5
    let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    let name = match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F64 => "float64",
        _ => "float32",
    };
    json.insert(key.into(), json!(name));
    if model.head() == Head::Scalar {
        json.insert("num_labels".into(), json!(1));
        json.insert("id2label".into(), json!({"0": "LABEL_0"}));
        json.insert("label2id".into(), json!({"LABEL_0": 0}));
        // Without one, transformers scores no batch of several texts.
        if json.get("pad_token_id").is_none_or(Value::is_null) {
            let eos = json.get("eos_token_id").cloned().unwrap_or(Value::Null);
            let first = if eos.is_array() { eos[0].clone() } else { eos };
            json.insert("pad_token_id".into(), first);
        }
    }
    json
}
