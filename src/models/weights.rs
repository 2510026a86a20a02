//! Hugging Face folders: `config.json`, `model.safetensors` or its shards with an index.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{Config, Family, Head, Layout, Model, Params, Position, Slot, Spec, Tensor};
use crate::{
    device::{Device, Float, file},
    error::{Error, Result},
    rng::{Philox, Purpose},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const LM_HEAD: &str = "lm_head.weight";
const SCORE: &str = "score.weight";

/// Where one of our weights is stored.
struct Source {
    name: String,
    /// Rows of ours that it holds.
    rows: usize,
}

fn sources(family: &Family, t: &Tensor, spec: &Spec) -> Vec<Source> {
    let layer = t.layer.map(|l| l.to_string()).unwrap_or_default();
    match t.slot {
        Slot::LmHead => return vec![Source { name: LM_HEAD.into(), rows: t.rows }],
        Slot::Score => return vec![Source { name: SCORE.into(), rows: t.cols }],
        _ => {}
    }
    let names = family.names.iter().find(|n| n.0 == t.slot).map_or(&[][..], |n| n.1);
    let (q, kv) = (spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let total = if t.slot.is_vector() { t.cols } else { t.rows };
    let parts: &[usize] = match (t.slot, names.len()) {
        (_, 1) => &[total],
        (Slot::Qkv | Slot::QkvBias, 3) => &[q, kv, kv],
        (_, n) => &vec![total / n.max(1); n],
    };
    let source = |(name, rows): (&&str, &usize)| Source {
        name: format!("{}{}", family.prefix, name.replace("{}", &layer)),
        rows: *rows,
    };
    names.iter().zip(parts).map(source).collect()
}

/// Tensors by name: what each holds, and its file.
type Tensors<'a> = HashMap<String, (TensorView<'a>, &'a Path)>;

/// The files of a folder, mapped, and the tensors in them.
struct Folder {
    files: Vec<(PathBuf, Mmap)>,
}

impl Folder {
    fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        let names = if index.exists() { shards(&index)? } else { vec![SINGLE.to_owned()] };
        let open = |name: &String| {
            let path = dir.join(name);
            file::map(&path).map(|map| (path, map))
        };
        Ok(Self { files: names.iter().map(open).collect::<Result<_>>()? })
    }

    /// All tensors by name.
    fn tensors(&self) -> Result<Tensors<'_>> {
        let mut all = HashMap::new();
        for (path, map) in &self.files {
            let file = SafeTensors::deserialize(map)
                .map_err(|e| Error::file(path, format!("no safetensors file: {e}")))?;
            for (name, view) in file.tensors() {
                if all.insert(name.clone(), (view, path.as_path())).is_some() {
                    return Err(Error::file(path, format!("`{name}` is in two shards")));
                }
            }
        }
        Ok(all)
    }
}

/// The shard names of an index, each once, in order of first use.
fn shards(index: &Path) -> Result<Vec<String>> {
    let text = file::read_text(index, 64 << 20)?;
    let json: Value =
        serde_json::from_str(&text).map_err(|e| Error::file(index, format!("not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::file(index, "`weight_map` is missing"))?;
    let mut names: Vec<String> = Vec::new();
    for (tensor, name) in map {
        let name = name.as_str().unwrap_or_default();
        // A shard is a file of this folder: no path may lead out of it.
        if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
            let message = format!("shard of `{tensor}` is {name:?}, wanted a file name");
            return Err(Error::file(index, message));
        }
        if !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Loads a model. Weights may be f32, f16 or bf16, with or without the family's prefix.
///
/// A folder without `score.weight` has no scalar head. If one is wanted all the same, to be trained,
/// `new_head` is the seed with which it is drawn from N(0, 1/(hidden + 1)) (Stiennon et al. 2020; the
/// form that N+ and lm-human-preferences use: standard deviation 1/sqrt(hidden + 1)).
///
/// # Errors
/// [`Error::Io`] and [`Error::File`], naming file and tensor: missing, of the wrong shape or
/// dtype, not finite, or unknown (a tensor that would be ignored is a model that is misread).
pub fn load<F: Float>(
    dev: &Device,
    dir: &Path,
    head: Head,
    new_head: Option<u64>,
) -> Result<Model<F>> {
    let config = Config::read(dir)?;
    let (family, spec) = config.spec()?;
    let folder = Folder::open(dir)?;
    let mut stored = folder.tensors()?;
    if head == Head::Scalar && new_head.is_none() && !stored.contains_key(SCORE) {
        let message = format!("`{SCORE}` is missing: it is no reward model");
        return Err(Error::file(dir, message));
    }
    check_sizes::<F>(dir, &config, family, &spec, head, &stored)?;
    let mut model = Model::zeros(dev, config, head)?;
    for t in model.params.layout().clone().tensors() {
        if let (Slot::Score, Some(seed), false) = (t.slot, new_head, stored.contains_key(SCORE)) {
            init_score(model.params.tensor_mut(t).host(), seed);
            continue;
        }
        let out = model.params.tensor_mut(t).host();
        let mut row = 0;
        for source in sources(family, t, &spec) {
            let name = stored_name(&stored, family, &source.name);
            let Some((view, path)) = stored.remove(name) else {
                return Err(Error::file(dir, format!("`{name}` is missing")));
            };
            let cols = if t.slot.is_vector() { 1 } else { t.cols };
            let part = &mut out[row * cols..(row + source.rows) * cols];
            copy(part, &view, (source.rows, cols), is_transposed(family, t))
                .map_err(|message| Error::file(path, format!("`{name}` {message}")))?;
            row += source.rows;
        }
    }
    let known = |name: &str| {
        name == LM_HEAD || name == SCORE || family.ignored.iter().any(|end| name.ends_with(end))
    };
    if let Some((name, (_, path))) = stored.iter().find(|(name, _)| !known(name)) {
        let message = format!("`{name}` is no weight of a {} model", family.model_type);
        return Err(Error::file(*path, message));
    }
    model.repack(dev)?;
    Ok(model)
}

/// The name under which a weight is stored, with the family's prefix or without.
fn stored_name<'a>(stored: &Tensors<'_>, family: &Family, name: &'a str) -> &'a str {
    let bare = name.strip_prefix(family.prefix).unwrap_or(name);
    if !stored.contains_key(name) && stored.contains_key(bare) { bare } else { name }
}

fn is_transposed(family: &Family, t: &Tensor) -> bool {
    family.transposed && t.slot.is_block_linear()
}

/// Refuses a config whose sizes are not those of the stored tensors. It is run before anything is
/// allocated by the config's word, so that a model never takes memory that its files cannot fill.
fn check_sizes<F: Float>(
    dir: &Path,
    config: &Config,
    family: &Family,
    spec: &Spec,
    head: Head,
    stored: &Tensors<'_>,
) -> Result<()> {
    if spec.layers > stored.len() {
        let want = format!("at most the number of stored tensors, {}", stored.len());
        return Err(config.wrong("number of layers", &want, &spec.layers));
    }
    // One block first: once its sizes are known to be true, they bound those of all blocks.
    for layers in [1, spec.layers] {
        let layout = Layout::new(&Spec { layers, ..spec.clone() }, head);
        for t in layout.tensors() {
            if t.slot == Slot::Score && !stored.contains_key(SCORE) {
                continue;
            }
            for source in sources(family, t, spec) {
                let name = stored_name(stored, family, &source.name);
                let Some((view, path)) = stored.get(name) else {
                    return Err(Error::file(dir, format!("`{name}` is missing")));
                };
                let want = match (t.slot.is_vector(), is_transposed(family, t)) {
                    (true, _) => vec![source.rows],
                    (false, true) => vec![t.cols, source.rows],
                    (false, false) => vec![source.rows, t.cols],
                };
                let got = view.shape();
                // A scalar head is stored `[1, hidden]`.
                if got != want && !(t.slot.is_vector() && got == [1, source.rows]) {
                    let message = format!("`{name}` has shape {got:?}, wanted {want:?}");
                    return Err(Error::file(*path, message));
                }
            }
        }
    }
    if let Position::Rope(_) = spec.position {
        let files: usize = stored.values().map(|(view, _)| view.data().len()).sum();
        let table = spec.max_positions * spec.head_dim * size_of::<F>();
        // No less than this: small models with long contexts exist.
        if table > files.max(64 << 20) {
            let want = format!(
                "fewer: their rotary table would have {table} bytes, the weights have {files}"
            );
            return Err(config.wrong("number of positions", &want, &spec.max_positions));
        }
    }
    Ok(())
}

/// Widens a stored tensor of the right shape into `out` `[rows, cols]`; the message says what was
/// wanted and came.
fn copy<F: Float>(
    out: &mut [F],
    view: &TensorView<'_>,
    (rows, cols): (usize, usize),
    transposed: bool,
) -> Result<(), String> {
    let place = |i: usize| if transposed { i % rows * cols + i / rows } else { i };
    let data = view.data();
    let mut bad = None;
    let mut put = |i: usize, x: f64| {
        let y = F::of(x);
        if !y.is_finite() {
            bad.get_or_insert((i, x));
        }
        out[place(i)] = y;
    };
    let two = |c: &[u8]| u16::from_le_bytes([c[0], c[1]]);
    match view.dtype() {
        Dtype::F32 => data.chunks_exact(4).enumerate().for_each(|(i, c)| {
            put(i, f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]])));
        }),
        Dtype::BF16 => data.chunks_exact(2).enumerate().for_each(|(i, c)| {
            put(i, bf16::from_bits(two(c)).to_f64());
        }),
        Dtype::F16 => data.chunks_exact(2).enumerate().for_each(|(i, c)| {
            put(i, f16::from_bits(two(c)).to_f64());
        }),
        Dtype::F64 => data.chunks_exact(8).enumerate().for_each(|(i, c)| {
            put(i, f64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]));
        }),
        other => return Err(format!("is {other:?}, wanted F32, F16, BF16 or F64")),
    }
    match bad {
        Some((i, x)) => Err(format!("has {x} at element {i}, wanted finite {}", F::NAME)),
        None => Ok(()),
    }
}

/// Draws a scalar head.
pub(super) fn init_score<F: Float>(w: &mut [F], seed: u64) {
    let draw = Philox::new(seed, 0, 0, Purpose::Init);
    let std = 1.0 / ((w.len() + 1) as f64).sqrt();
    for (i, w) in w.iter_mut().enumerate() {
        *w = F::of(std * draw.normal(i as u32));
    }
}

/// A stored tensor, made when the writer asks for it.
struct Stored<'a, F> {
    data: &'a [F],
    shape: Vec<usize>,
    transposed: bool,
}

impl<F: Float> safetensors::View for Stored<'_, F> {
    fn dtype(&self) -> Dtype {
        if size_of::<F>() == 4 { Dtype::F32 } else { Dtype::F64 }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        if !self.transposed {
            return Cow::Borrowed(bytemuck::cast_slice(self.data));
        }
        let (k, n) = (self.shape[0], self.shape[1]);
        let turned: Vec<F> = (0..k * n).map(|i| self.data[i % n * k + i / n]).collect();
        Cow::Owned(bytemuck::cast_slice(&turned).to_vec())
    }
    fn data_len(&self) -> usize {
        size_of_val(self.data)
    }
}

/// The tensors of `params` as Hugging Face names and shapes them.
fn stored<'a, F: Float>(
    model: &'a Model<F>,
    params: &'a Params<F>,
) -> impl Iterator<Item = (String, Stored<'a, F>)> {
    params.layout().tensors().iter().flat_map(move |t| {
        let all = params.tensor(t).host();
        let transposed = is_transposed(model.family, t);
        let vector = t.slot.is_vector();
        let cols = if vector { 1 } else { t.cols };
        let mut row = 0;
        sources(model.family, t, &model.spec).into_iter().map(move |source| {
            let data = &all[row * cols..(row + source.rows) * cols];
            row += source.rows;
            let shape = match (t.slot, vector, transposed) {
                (Slot::Score, ..) => vec![1, t.cols],
                (_, true, _) => vec![source.rows],
                (_, _, true) => vec![cols, source.rows],
                _ => vec![source.rows, cols],
            };
            (source.name, Stored { data, shape, transposed })
        })
    })
}

/// Weights, gradients or moments under their Hugging Face names: name, shape, numbers in the
/// stored order.
#[must_use]
pub fn named<F: Float>(model: &Model<F>, params: &Params<F>) -> Vec<(String, Vec<usize>, Vec<F>)> {
    use safetensors::View;
    let numbers = |s: &Stored<'_, F>| bytemuck::allocation::pod_collect_to_vec::<u8, F>(&s.data());
    stored(model, params).map(|(name, s)| (name, s.shape.clone(), numbers(&s))).collect()
}

/// The Hugging Face name of the tensor that holds element `i` of all weights (or gradients).
#[must_use]
pub fn tensor_at<F: Float>(model: &Model<F>, i: usize) -> Option<String> {
    let t = model.params.layout().at(i)?;
    let row = (i - t.offset) / if t.slot.is_vector() { 1 } else { t.cols };
    let mut end = 0;
    let holds = |s: &Source| {
        end += s.rows;
        row < end
    };
    sources(model.family, t, &model.spec).into_iter().find(holds).map(|s| s.name)
}

/// Writes `config.json` and `model.safetensors` into an existing folder, in the layout that
/// `transformers` loads: a value or reward model as `AutoModelForSequenceClassification` with
/// `score.weight`. Weights are stored as f32, whatever they were loaded from.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] if a file cannot be written.
pub fn save<F: Float>(model: &Model<F>, dir: &Path) -> Result<()> {
    let path = dir.join("config.json");
    let mut text = serde_json::to_string_pretty(&Value::Object(config(model)))
        .map_err(|e| Error::file(&path, e.to_string()))?;
    text.push('\n');
    std::fs::write(&path, text).map_err(Error::io("write", &path))?;

    let stored: BTreeMap<String, Stored<'_, F>> = stored(model, &model.params).collect();
    let path = dir.join(SINGLE);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(stored, Some(metadata), &path)
        .map_err(|e| Error::file(&path, format!("cannot be written: {e}")))
}

/// The loaded `config.json` with head and dtype as they are now.
fn config<F: Float>(model: &Model<F>) -> serde_json::Map<String, Value> {
    let mut json = model.config.json().clone();
    let architecture = match model.head {
        Head::Lm => model.family.causal_lm,
        Head::Scalar => model.family.sequence_classification,
    };
    json.insert("architectures".into(), json!([architecture]));
    // "torch_dtype" up to transformers 4, "dtype" from 5
    let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    json.insert(key.into(), json!(if size_of::<F>() == 4 { "float32" } else { "float64" }));
    if model.head == Head::Scalar {
        json.insert("num_labels".into(), json!(1));
        json.insert("id2label".into(), json!({"0": "LABEL_0"}));
        json.insert("label2id".into(), json!({"LABEL_0": 0}));
    }
    json
}
