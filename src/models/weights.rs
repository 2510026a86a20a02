//! Hugging Face folders: `config.json`, `model.safetensors` or its shards with an index.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{
    Config, Family, Head, Layout, Model, ParamKind, ParamTensor, Params, Residency, Spec,
    StoredWeight, family::by_rows, model::new_score,
};
use crate::{
    device::{Device, Element, Float, file},
    error::{Error, Result},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The heads' names, which most families share.
const HEADS: [StoredWeight; 2] =
    [by_rows(ParamKind::LmHead, &["lm_head.weight"]), by_rows(ParamKind::Score, &[SCORE])];
const SCORE: &str = "score.weight";

/// A stored tensor: one of our weights, or some of its rows.
struct StoredRows {
    name: String,
    rows: Range<usize>,
}

fn stored_as(family: &Family, kind: ParamKind) -> Option<&StoredWeight> {
    family.weights.iter().chain(&HEADS).find(|w| w.kind == kind)
}

fn is_transposed(family: &Family, t: &ParamTensor) -> bool {
    stored_as(family, t.kind).is_some_and(|w| w.transposed)
}

fn sources(family: &Family, t: &ParamTensor, spec: &Spec) -> Vec<StoredRows> {
    let layer = t.layer.map(|l| l.to_string()).unwrap_or_default();
    let names = stored_as(family, t.kind).map_or(&[][..], |w| w.names);
    let prefix = if HEADS.iter().any(|w| w.kind == t.kind) { "" } else { family.prefix };
    let mut end = 0;
    let source = |(name, rows): (&&str, usize)| {
        let start = end;
        end += rows;
        StoredRows { name: format!("{prefix}{}", name.replace("{}", &layer)), rows: start..end }
    };
    let axis = if t.is_vector() { t.facts.cols } else { t.facts.rows };
    names.iter().zip(axis.parts(spec, names.len())).map(source).collect()
}

/// Where the rows and columns of a stored weight are in ours, which a device may pad. A vector is a
/// column.
struct Places {
    rows: Vec<usize>,
    cols: Vec<usize>,
    /// From one of our rows to the next.
    stride: usize,
}

impl Places {
    fn of(t: &ParamTensor, spec: &Spec) -> Self {
        let (rows, cols) = (t.facts.rows, t.facts.cols.places(spec));
        if t.is_vector() {
            return Self { rows: cols, cols: vec![0], stride: 1 };
        }
        Self { rows: rows.places(spec), cols, stride: t.cols }
    }

    /// Ours has no padding.
    fn plain(&self) -> bool {
        let in_place = |x: &[usize]| x.last().is_none_or(|last| last + 1 == x.len());
        self.cols.len() == self.stride && in_place(&self.rows)
    }
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

impl<T: Element> Model<T> {
    /// Loads a Hugging Face folder to compute with; see [`load`].
    pub fn load(dev: &Device, dir: &Path, head: Head, new_head: Option<u64>) -> Result<Self> {
        load(dev, dir, head, new_head, Residency::Frozen)
    }

    /// Loads a Hugging Face folder to train it; see [`load`].
    pub fn load_trained(
        dev: &Device,
        dir: &Path,
        head: Head,
        new_head: Option<u64>,
    ) -> Result<Self> {
        load(dev, dir, head, new_head, Residency::Trained)
    }
}

/// Loads a model. Weights may be f32, f16 or bf16, with or without the family's prefix.
///
/// A folder without `score.weight` has no scalar head. If one is wanted all the same, to be
/// trained, `new_head` is the seed with which it is drawn from N(0, 1/(hidden + 1)) (Stiennon et
/// al. 2020; the form that N+ and lm-human-preferences use: standard deviation 1/sqrt(hidden + 1)).
///
/// # Errors
/// [`Error::Io`] and [`Error::File`], naming file and tensor: missing, of the wrong shape or
/// dtype, not finite, or unknown (a tensor that would be ignored is a model that is misread).
pub fn load<T: Element>(
    dev: &Device,
    dir: &Path,
    head: Head,
    new_head: Option<u64>,
    residency: Residency,
) -> Result<Model<T>> {
    let config = Config::read(dir)?;
    let (family, spec) = config.spec()?;
    let folder = Folder::open(dir)?;
    let mut stored = folder.tensors()?;
    if head == Head::Scalar && new_head.is_none() && !stored.contains_key(SCORE) {
        let message = format!("`{SCORE}` is missing: it is no reward model");
        return Err(Error::file(dir, message));
    }
    check_sizes::<T>(dir, &config, family, &spec, head, &stored)?;
    let mut model = Model::zeros(dev, config, head, residency)?;
    let mut out = Vec::new();
    for t in model.params().layout().clone().tensors() {
        if let (ParamKind::Score, Some(seed), false) =
            (t.kind, new_head, stored.contains_key(SCORE))
        {
            model.write(dev, t, &new_score(t.cols, seed))?;
            continue;
        }
        out.clear();
        out.resize(t.len(), T::Acc::ZERO);
        let places = Places::of(t, model.spec());
        for source in sources(family, t, model.spec()) {
            let name = stored_name(&stored, family, &source.name);
            let Some((view, path)) = stored.remove(name) else {
                return Err(Error::file(dir, format!("`{name}` is missing")));
            };
            copy::<T>(&mut out, &places, source.rows, &view, is_transposed(family, t))
                .map_err(|message| Error::file(path, format!("`{name}` {message}")))?;
        }
        model.write(dev, t, &out)?;
    }
    let known = |name: &str| {
        HEADS.iter().any(|w| w.names.contains(&name))
            || family.ignored.iter().any(|end| name.ends_with(end))
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

/// Refuses a config whose sizes are not those of the stored tensors, before any memory is taken for
/// it: a model never takes memory that its files cannot fill.
fn check_sizes<T: Element>(
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
            if t.kind == ParamKind::Score && !stored.contains_key(SCORE) {
                continue;
            }
            for source in sources(family, t, spec) {
                let name = stored_name(stored, family, &source.name);
                let Some((view, path)) = stored.get(name) else {
                    return Err(Error::file(dir, format!("`{name}` is missing")));
                };
                let rows = source.rows.len();
                let want = match (t.is_vector(), is_transposed(family, t)) {
                    (true, _) => vec![rows],
                    (false, true) => vec![t.cols, rows],
                    (false, false) => vec![rows, t.cols],
                };
                let got = view.shape();
                // A scalar head is stored `[1, hidden]`.
                if got != want && !(t.is_vector() && got == [1, rows]) {
                    let message = format!("`{name}` has shape {got:?}, wanted {want:?}");
                    return Err(Error::file(*path, message));
                }
            }
        }
    }
    let files: usize = stored.values().map(|(view, _)| view.data().len()).sum();
    let table = spec.rope_bytes(size_of::<T::Acc>());
    // Small models with long contexts exist.
    if table > files.max(64 << 20) {
        let want =
            format!("fewer: their rotary table would have {table} bytes, the weights have {files}");
        return Err(config.wrong("number of positions", &want, &spec.max_positions));
    }
    Ok(())
}

/// Widens a stored tensor of the right shape into the rows `rows` of a weight; an error says what
/// was wanted and came.
fn copy<T: Element>(
    out: &mut [T::Acc],
    places: &Places,
    rows: Range<usize>,
    view: &TensorView<'_>,
    transposed: bool,
) -> Result<(), String> {
    let (n, cols) = (rows.len(), places.cols.len());
    let plain = places.plain() && !transposed;
    let place = |i: usize| {
        if plain {
            return rows.start * cols + i;
        }
        let (r, c) = if transposed { (i % n, i / n) } else { (i / cols, i % cols) };
        places.rows[rows.start + r] * places.stride + places.cols[c]
    };
    let mut bad = None;
    let put = |i: usize, x: f64| {
        if !T::of(x).f64().is_finite() {
            bad.get_or_insert((i, x));
        }
        out[place(i)] = <T::Acc as Element>::of(x);
    };
    match view.dtype() {
        Dtype::F32 => widen(view.data(), |x: f32| f64::from(x), put),
        Dtype::BF16 => widen(view.data(), bf16::to_f64, put),
        Dtype::F16 => widen(view.data(), f16::to_f64, put),
        Dtype::F64 => widen(view.data(), |x: f64| x, put),
        other => return Err(format!("is {other:?}, wanted F32, F16, BF16 or F64")),
    }
    match bad {
        Some((i, x)) => Err(format!("has {x} at element {i}, wanted finite {}", T::NAME)),
        None => Ok(()),
    }
}

/// Gives each stored number to `put`.
fn widen<S: Pod>(data: &[u8], wide: impl Fn(S) -> f64, mut put: impl FnMut(usize, f64)) {
    let numbers = data.chunks_exact(size_of::<S>()).map(bytemuck::pod_read_unaligned);
    numbers.enumerate().for_each(|(i, x)| put(i, wide(x)));
}

/// A tensor to store, transposed when the writer asks for it.
struct Stored<'a, F: Clone> {
    data: Cow<'a, [F]>,
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
            return Cow::Borrowed(bytemuck::cast_slice(&self.data));
        }
        let (k, n) = (self.shape[0], self.shape[1]);
        let turned: Vec<F> = (0..k * n).map(|i| self.data[i % n * k + i / n]).collect();
        Cow::Owned(bytemuck::cast_slice(&turned).to_vec())
    }
    fn data_len(&self) -> usize {
        size_of_val(&*self.data)
    }
}

/// The tensors of a model as Hugging Face names and shapes them, from the flat numbers of all.
fn stored<'a, T: Element, F: Float>(
    model: &'a Model<T>,
    flat: &'a [F],
) -> impl Iterator<Item = (String, Stored<'a, F>)> {
    model.params().layout().tensors().iter().flat_map(move |t| {
        let all = &flat[t.offset..t.offset + t.len()];
        let transposed = is_transposed(model.family(), t);
        let places = Places::of(t, model.spec());
        let cols = places.cols.len();
        sources(model.family(), t, model.spec()).into_iter().map(move |source| {
            let rows = source.rows;
            let shape = match (t.kind, t.is_vector(), transposed) {
                (ParamKind::Score, ..) => vec![1, t.cols],
                (_, true, _) => vec![rows.len()],
                (_, _, true) => vec![cols, rows.len()],
                _ => vec![rows.len(), cols],
            };
            let data = if places.plain() {
                Cow::Borrowed(&all[rows.start * cols..rows.end * cols])
            } else {
                let mut part = Vec::with_capacity(rows.len() * cols);
                for r in &places.rows[rows] {
                    part.extend(places.cols.iter().map(|c| all[r * places.stride + c]));
                }
                Cow::Owned(part)
            };
            (source.name, Stored { data, shape, transposed })
        })
    })
}

/// A tensor as Hugging Face has it: name, shape, numbers in the stored order.
pub type Named<F> = (String, Vec<usize>, Vec<F>);

/// Weights, gradients or moments under their Hugging Face names.
pub fn named<T: Element, F: Float>(
    dev: &Device,
    model: &Model<T>,
    params: &Params<F>,
) -> Result<Vec<Named<F>>> {
    use safetensors::View;
    let numbers = |s: &Stored<'_, F>| bytemuck::allocation::pod_collect_to_vec::<u8, F>(&s.data());
    let flat = dev.on_host(params.flat())?;
    Ok(stored(model, &flat).map(|(name, s)| (name, s.shape.clone(), numbers(&s))).collect())
}

/// Weights of a model in files.
pub fn count<T: Element>(model: &Model<T>) -> usize {
    let size = |t: &ParamTensor| {
        let p = Places::of(t, model.spec());
        p.rows.len() * p.cols.len()
    };
    model.params().layout().tensors().iter().map(size).sum()
}

/// The Hugging Face name of the tensor that holds element `i` of the flat weights or gradients.
pub fn tensor_at<T: Element>(model: &Model<T>, i: usize) -> Option<String> {
    let t = model.params().layout().at(i)?;
    let places = Places::of(t, model.spec());
    let own = (i - t.offset) / places.stride;
    // An entry of the padding counts as the row before it.
    let row = places.rows.partition_point(|r| *r <= own).saturating_sub(1);
    let holds = |s: &StoredRows| s.rows.contains(&row);
    sources(model.family(), t, model.spec()).into_iter().find(holds).map(|s| s.name)
}

/// Writes `config.json` and `model.safetensors` into an existing folder, in the layout that
/// `transformers` loads: a value or reward model as `AutoModelForSequenceClassification` with
/// `score.weight`. Weights are stored as f32, whatever they were loaded from.
pub fn save<T: Element>(dev: &Device, model: &Model<T>, dir: &Path) -> Result<()> {
    let path = dir.join("config.json");
    let mut text = serde_json::to_string_pretty(&Value::Object(config(model)))
        .map_err(|e| Error::file(&path, e.to_string()))?;
    text.push('\n');
    std::fs::write(&path, text).map_err(Error::io("write", &path))?;

    let flat = dev.on_host(model.master()?)?;
    let stored: BTreeMap<String, Stored<'_, T::Acc>> = stored(model, &flat).collect();
    let path = dir.join(SINGLE);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(stored, Some(metadata), &path)
        .map_err(|e| Error::file(&path, format!("cannot be written: {e}")))
}

/// The loaded `config.json` with head and dtype as they are now.
fn config<T: Element>(model: &Model<T>) -> serde_json::Map<String, Value> {
    let mut json = model.config().json().clone();
    let architecture = match model.head() {
        Head::Lm => model.family().causal_lm,
        Head::Scalar => model.family().sequence_classification,
    };
    json.insert("architectures".into(), json!([architecture]));
    // "torch_dtype" up to transformers 4, "dtype" from 5
    let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    json.insert(key.into(), json!(if size_of::<T::Acc>() == 4 { "float32" } else { "float64" }));
    if model.head() == Head::Scalar {
        json.insert("num_labels".into(), json!(1));
        json.insert("id2label".into(), json!({"0": "LABEL_0"}));
        json.insert("label2id".into(), json!({"LABEL_0": 0}));
    }
    json
}
