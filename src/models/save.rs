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
    FactorSide, Family, Head, Layout, Model, ParamKind, ParamTensor, Params, Spec,
    weights::{Places, StoredRows, WEIGHTS_FILE, sources, stored_shape, transposed},
};
use crate::{
    device::{Device, Element, Float, View, reserve},
    error::{Error, Result},
};

/// A stored tensor: its name, its shape there, and the weight that it is some rows of.
pub(super) struct StoredTensor<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    of: &'a ParamTensor,
    pub places: Places,
    pub rows: std::ops::Range<usize>,
    /// See [`transposed`].
    transposed: Option<usize>,
}

/// The tensors of a model as Hugging Face names and shapes them.
fn stored<'a, T: Element>(
    model: &'a Model<T>,
    layout: &'a Layout,
) -> impl Iterator<Item = StoredTensor<'a>> {
    let adapter = model.adapter().is_some_and(|own| std::ptr::eq(&**own.layout(), layout));
    layout.tensors().iter().flat_map(move |of| {
        if adapter {
            return vec![adapter_tensor(model.family(), model.spec(), of)];
        }
        let transposed = transposed(model.family(), of);
        let all = sources(model.family(), of, model.spec()).into_iter().map(|source| {
            let StoredRows { name, rows } = source;
            let places = Places::of(model.family(), of, model.spec());
            let cols = places.cols.len();
            let shape = match of.kind {
                ParamKind::Score | ParamKind::SharedGate => vec![1, of.cols],
                _ => stored_shape(model.family(), of, rows.len(), cols),
            };
            StoredTensor { name, shape, of, places, rows, transposed }
        });
        all.collect()
    })
}

/// A factor of an adapter, or the head that is saved with it, as PEFT names and shapes it.
pub(super) fn adapter_tensor<'a>(
    family: &Family,
    spec: &Spec,
    of: &'a ParamTensor,
) -> StoredTensor<'a> {
    const PREFIX: &str = "base_model.model";
    let weight = ParamTensor { rows: of.facts.rows.len(spec), ..of.clone() };
    let source = |part: usize| {
        let mut all = sources(family, &weight, spec);
        if part < all.len() { all.swap_remove(part) } else { StoredRows::none() }
    };
    let Some(factor) = of.factor else {
        let StoredRows { name, rows } = source(0);
        let (name, shape) = (format!("{PREFIX}.{name}"), vec![1, of.cols]);
        let places = Places::of(family, of, spec);
        return StoredTensor { name, shape, of, places, rows, transposed: None };
    };
    let StoredRows { name, rows } = source(factor.part);
    let module = name.trim_end_matches(".weight");
    let name = format!("{PREFIX}.{module}.lora_{:?}.weight", factor.side);
    let rank: Vec<usize> = (0..spec.adapter.as_ref().map_or(0, |a| a.rank)).collect();
    let Places { rows: own, cols, .. } = Places::of(family, &weight, spec);
    let (rows, cols) = match factor.side {
        FactorSide::A => (rank, cols),
        FactorSide::B => (own[rows].iter().map(|r| r - factor.first).collect(), rank),
    };
    let shape = vec![rows.len(), cols.len()];
    let places = Places { rows, cols, stride: of.cols };
    StoredTensor { name, rows: 0..shape[0], shape, of, places, transposed: None }
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
    stored(model, params.layout()).map(one).collect()
}

/// Weights of a model in files, without those of an adapter.
pub fn count<T: Element>(model: &Model<T>) -> usize {
    stored(model, model.params().layout()).map(|s| s.len()).sum()
}

/// Those of its adapter.
pub fn adapter_count<T: Element>(model: &Model<T>) -> usize {
    let own = model.adapter().map(|own| stored(model, own.layout()).map(|s| s.len()).sum());
    own.unwrap_or(0)
}

/// The Hugging Face name of the tensor that holds element `i` of flat weights or gradients in this
/// layout.
pub fn tensor_at<T: Element>(model: &Model<T>, layout: &Layout, i: usize) -> Option<String> {
    let t = layout.at(i)?;
    if t.factor.is_some() {
        return Some(adapter_tensor(model.family(), model.spec(), t).name);
    }
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

/// Hands the bytes of [`WEIGHTS_FILE`] to `write`, or of an adapter's, weights rounded to `dtype`.
/// One tensor at a time is in host memory.
///
/// # Errors
/// [`Error::Value`] for a weight that `dtype` cannot hold.
pub fn write_weights<T: Element>(
    dev: &Device,
    model: &Model<T>,
    dtype: Dtype,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut tensors: Vec<_> = stored(model, model.trained()).collect();
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

/// The text of its adapter's `adapter_config.json`, in which `base` names the model that it is of.
///
/// # Errors
/// [`Error::Value`] for a model without an adapter.
pub fn adapter_config_text<T: Element>(model: &Model<T>, base: &Path) -> Result<String> {
    let adapter = model.config().adapter();
    let adapter = adapter.ok_or_else(|| Error::value("adapter to store", "one", "none"))?;
    let has_score = model.spec().adapter.as_ref().is_some_and(|adapter| adapter.score);
    Ok(adapter.text((model.head() == Head::Scalar, has_score), base))
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
