//! Loads Hugging Face folders: `config.json`, `model.safetensors` or its shards with an index.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorView};
use serde_json::Value;

use super::{
    Config, Family, Head, Layout, Model, ParamKind, ParamTensor, Residency, Spec, StoredOrder,
    StoredWeight, family::by_rows, folder, model::new_score,
};
use crate::{
    device::{Device, Element, Float, file, reserve},
    error::{Error, Result},
};

/// The file of a model that is not sharded.
pub const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The heads' names, which most families share.
const HEADS: [StoredWeight; 2] =
    [by_rows(ParamKind::LmHead, &[LM_HEAD]), by_rows(ParamKind::Score, &[SCORE])];
/// The text part among the tensors of a model with others.
const TEXT_PART: &str = "model.language_model.";
const LM_HEAD: &str = "lm_head.weight";
const SCORE: &str = "score.weight";

/// A stored tensor: one of our weights, or some of its rows.
pub(super) struct StoredRows {
    pub name: String,
    pub rows: Range<usize>,
}

impl StoredRows {
    pub fn none() -> Self {
        Self { name: String::new(), rows: 0..0 }
    }
}

fn stored_as(family: &Family, kind: ParamKind) -> Option<&StoredWeight> {
    family.weights.iter().copied().flatten().chain(&HEADS).find(|w| w.kind == kind)
}

pub(super) fn order(family: &Family, t: &ParamTensor) -> StoredOrder {
    stored_as(family, t.kind).map_or(StoredOrder::Rows, |w| w.order)
}

/// Matrices that a tensor is made of, if they are stored `[in, out]`.
pub(super) fn transposed(family: &Family, t: &ParamTensor) -> Option<usize> {
    match order(family, t) {
        StoredOrder::Columns => Some(1),
        StoredOrder::Experts | StoredOrder::ExpertPairs => Some(t.stack),
        _ => None,
    }
}

/// The shape of `rows` rows of `cols` in files.
pub(super) fn stored_shape(
    family: &Family,
    t: &ParamTensor,
    rows: usize,
    cols: usize,
) -> Vec<usize> {
    match (order(family, t), t.is_vector()) {
        (StoredOrder::Experts | StoredOrder::ExpertPairs, true) => vec![t.stack, rows / t.stack],
        (StoredOrder::Experts | StoredOrder::ExpertPairs, false) => {
            vec![t.stack, cols, rows / t.stack]
        }
        (_, true) => vec![rows],
        (StoredOrder::Columns, false) => vec![cols, rows],
        (StoredOrder::Channels, false) => vec![rows, 1, cols],
        (_, false) => vec![rows, cols],
    }
}

pub(super) fn sources(family: &Family, t: &ParamTensor, spec: &Spec) -> Vec<StoredRows> {
    let layer = t.layer.map(|l| l.to_string()).unwrap_or_default();
    let names = stored_as(family, t.kind).map_or(&[][..], |w| w.names);
    let prefix = if HEADS.iter().any(|w| w.kind == t.kind) { "" } else { family.prefix };
    let mut end = 0;
    let source = |(name, rows): (String, usize)| {
        let start = end;
        end += rows;
        StoredRows { name: format!("{prefix}{}", name.replace("{}", &layer)), rows: start..end }
    };
    let axis = if t.is_vector() { t.facts.cols } else { t.facts.rows };
    let each = if names.iter().any(|name| name.contains("{e}")) { t.stack } else { 1 };
    let of_expert = |e: usize| names.iter().map(move |name| name.replace("{e}", &e.to_string()));
    let parts = axis.parts(spec, each * names.len());
    (0..each).flat_map(of_expert).zip(parts).map(source).collect()
}

/// Where the rows and columns of a stored weight are in ours, which a device may pad. A vector is a
/// column.
pub(super) struct Places {
    pub rows: Vec<usize>,
    pub cols: Vec<usize>,
    /// From one of our rows to the next.
    pub stride: usize,
}

impl Places {
    pub fn of(family: &Family, t: &ParamTensor, spec: &Spec) -> Self {
        let order = order(family, t);
        let ordered = |places: Vec<usize>| {
            (0..places.len()).map(|i| places[order.row(spec, i)]).collect::<Vec<_>>()
        };
        let (rows, cols) = (t.facts.rows, t.facts.cols.places(spec));
        if t.is_vector() {
            return Self { rows: ordered(cols), cols: vec![0], stride: 1 };
        }
        Self { rows: ordered(rows.places(spec)), cols, stride: t.cols }
    }

    /// Ours has neither padding nor another order.
    pub fn plain(&self) -> bool {
        let in_place = |x: &[usize]| x.iter().enumerate().all(|(i, at)| i == *at);
        self.cols.len() == self.stride && in_place(&self.cols) && in_place(&self.rows)
    }

    /// The stored row that is ours at `own`, or in whose padding it is.
    pub fn stored_row(&self, own: usize) -> usize {
        let before = (0..self.rows.len()).filter(|i| self.rows[*i] <= own);
        before.max_by_key(|i| self.rows[*i]).unwrap_or(0)
    }
}

/// Tensors by name: what each holds, and its file.
type Tensors<'a> = HashMap<String, (TensorView<'a>, &'a Path)>;

/// The files of a folder, mapped, and the tensors in them.
struct Folder {
    files: Vec<(PathBuf, Mmap)>,
    index: Option<ShardIndex>,
}

/// Which shard each tensor is in.
struct ShardIndex {
    path: PathBuf,
    shards: serde_json::Map<String, Value>,
}

impl Folder {
    /// A single file is taken before shards, as transformers does.
    fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        let sharded = !dir.join(WEIGHTS_FILE).exists() && index.exists();
        let index = sharded.then(|| ShardIndex::read(index)).transpose()?;
        let names = index.as_ref().map_or(Ok(vec![WEIGHTS_FILE]), ShardIndex::files)?;
        let open = |name: &str| {
            let path = dir.join(name);
            let map = file::map(&path).map_err(|e| folder::without(dir, name, e))?;
            Ok((path, map))
        };
        let files = names.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { files, index })
    }

    /// All tensors by name.
    fn tensors(&self) -> Result<Tensors<'_>> {
        let mut all = HashMap::new();
        for (path, map) in &self.files {
            let file = SafeTensors::deserialize(map)
                .map_err(|e| Error::file(path, no_safetensors(map, &e)))?;
            for (name, view) in file.tensors() {
                if all.insert(name.clone(), (view, path.as_path())).is_some() {
                    return Err(Error::file(path, format!("`{name}` is in two shards")));
                }
            }
        }
        for (name, shard) in self.index.iter().flat_map(|index| &index.shards) {
            let shard = shard.as_str().map(Path::new);
            let found = all.get(name).and_then(|(_, path)| path.file_name());
            if found != shard.and_then(Path::file_name) {
                let path =
                    self.index.as_ref().map(|index| &*index.path).unwrap_or(Path::new(INDEX));
                let shard = shard.unwrap_or(Path::new("")).display();
                return Err(Error::file(path, format!("`{name}` is not in {shard}")));
            }
        }
        Ok(all)
    }
}

impl ShardIndex {
    fn read(path: PathBuf) -> Result<Self> {
        let text = file::read_text(&path, 16 << 20)?;
        let mut json: Value = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
        match json.get_mut("weight_map").map(Value::take) {
            Some(Value::Object(shards)) => Ok(Self { path, shards }),
            _ => Err(Error::file(&path, "`weight_map` is missing")),
        }
    }

    /// The shard names, each once.
    fn files(&self) -> Result<Vec<&str>> {
        let mut names = BTreeSet::new();
        for (tensor, name) in &self.shards {
            let name = name.as_str().unwrap_or_default();
            // A shard is a file of this folder: no path may lead out of it.
            if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
                let message = format!("shard of `{tensor}` is {name:?}, wanted a file name");
                return Err(Error::file(&self.path, message));
            }
            names.insert(name);
        }
        Ok(names.into_iter().collect())
    }
}

/// Says of a file that is no safetensors file what it is, or which tensor is wrong.
pub(super) fn no_safetensors(bytes: &[u8], e: &SafeTensorError) -> String {
    if bytes.starts_with(b"version https://git-lfs") {
        return "is a Git LFS pointer, wanted the weights: `git lfs pull` gets them".into();
    }
    let header = || {
        let (size, rest) = bytes.split_at_checked(8)?;
        let size = usize::try_from(u64::from_le_bytes(size.try_into().ok()?)).ok()?;
        let all = serde_json::from_slice::<HashMap<String, Value>>(rest.get(..size)?).ok()?;
        Some((8 + size, all))
    };
    if let Some((start, all)) = header() {
        let ends = all.values().filter_map(|t| t["data_offsets"][1].as_u64());
        let end = ends.max().unwrap_or(0).saturating_add(start as u64);
        if end > bytes.len() as u64 {
            return format!("is cut off: it has {} bytes, its header tells of {end}", bytes.len());
        }
    }
    let wrong = |(_, t): &(String, Value)| {
        let number = |v: &Value| v.as_u64().map(u128::from);
        let shape = t["shape"].as_array().into_iter().flatten();
        let len = shape.map(number).try_fold(1u128, |n, d| n.checked_mul(d?));
        let bits = t["dtype"].as_str().map_or("", |d| d.trim_start_matches(char::is_alphabetic));
        let bytes = bits.parse::<u128>().ok().and_then(|bits| Some(len?.checked_mul(bits)? / 8));
        let span = number(&t["data_offsets"][1]).zip(number(&t["data_offsets"][0]));
        bytes.is_some() && span.and_then(|(end, start)| end.checked_sub(start)) != bytes
    };
    let mut tensors =
        header().into_iter().flat_map(|(_, all)| all).filter(|(name, _)| name != "__metadata__");
    let of = tensors.find(wrong).map(|(name, _)| format!(" (`{name}`)")).unwrap_or_default();
    format!("no safetensors file: {e}{of}")
}

/// What is made of a folder.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    pub head: Head,
    /// The seed of a scalar head that the folder has not.
    pub new_head: Option<u64>,
    pub residency: Residency,
    /// Tokens of the longest sequence, see [`Config::for_sequences`].
    pub longest: Option<usize>,
}

impl LoadOptions {
    /// To compute with, for sequences of any length that the model has positions for.
    pub fn frozen(head: Head) -> Self {
        Self { head, new_head: None, residency: Residency::Frozen, longest: None }
    }
}

/// Loads the weights beside a config, without an adapter; see [`load`](super::load).
pub(super) fn load_base<T: Element>(
    dev: &Device,
    config: Config,
    options: LoadOptions,
) -> Result<Model<T>> {
    let LoadOptions { head, new_head, residency, .. } = options;
    let dir = &config.dir().to_owned();
    let (family, spec) = config.spec()?;
    let classifier = config
        .json()
        .get("architectures")
        .and_then(|v| v[0].as_str())
        .filter(|name| name.ends_with("Classification"));
    if let (Head::Lm, Some(name)) = (head, classifier) {
        return Err(config.wrong("architectures", "a language model: it is a reward model", &name));
    }
    let folder = Folder::open(dir)?;
    let mut stored = folder.tensors()?;
    // So does transformers name what it saves of the text part of a model that it read whole.
    let part = |name: &String| name.starts_with(TEXT_PART) || name.starts_with("mtp.");
    if config.is_nested() || stored.keys().any(part) {
        let all = stored.into_iter();
        stored = all.filter_map(|(name, tensor)| Some((text_name(&name)?, tensor))).collect();
    }
    if stored_as(family, ParamKind::ExpertsUp).is_some_and(|w| w.names[0].contains("{e}")) {
        unstack(&mut stored)?;
    }
    if spec.tied && head == Head::Lm {
        check_tied(family, &spec, &stored)?;
    }
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
        if out.capacity() < t.len() {
            out = reserve("a tensor to load", t.len())?;
        }
        out.resize(t.len(), T::Acc::ZERO);
        let places = Places::of(family, t, model.spec());
        for source in sources(family, t, model.spec()) {
            let name = stored_name(&stored, family, &source.name);
            let Some((view, path)) = stored.remove(name) else {
                return Err(Error::file(dir, format!("`{name}` is missing")));
            };
            if t.kind == ParamKind::Embedding {
                // Wider than anything is computed in.
                model.stored = if view.dtype() == Dtype::F64 { Dtype::F32 } else { view.dtype() };
            }
            copy::<T>(&mut out, &places, source.rows, &view, transposed(family, t))
                .map_err(|message| Error::file(path, format!("`{name}` {message}")))?;
        }
        model.write(dev, t, &out)?;
    }
    let known = |name: &str| {
        let heads = HEADS.iter().filter_map(|w| stored_as(family, w.kind));
        heads.into_iter().any(|w| w.names.contains(&name))
            || family.ignored.iter().any(|end| name.ends_with(end))
    };
    if let Some((name, (_, path))) = stored.iter().find(|(name, _)| !known(name)) {
        let message = format!("`{name}` is no weight of a {} model", family.model_type);
        return Err(Error::file(*path, message));
    }
    model.repack(dev)?;
    Ok(model)
}

/// Experts that lie in one tensor `[experts, out, in]`, as Qwen 3.5 has them, under the names of
/// each; where they have names of their own, nothing changes.
fn unstack(stored: &mut Tensors<'_>) -> Result<()> {
    let all = [(".gate_up_proj", &["gate_proj", "up_proj"][..]), (".down_proj", &["down_proj"])];
    for (end, parts) in all {
        let stacks = stored.keys().filter(|name| name.ends_with(&format!(".experts{end}")));
        for name in stacks.cloned().collect::<Vec<_>>() {
            let Some((view, path)) = stored.remove(&name) else { continue };
            let wrong = |e: &dyn std::fmt::Display| Error::file(path, format!("`{name}` {e}"));
            let &[experts, rows, cols] = view.shape() else {
                let message = format!("has shape {:?}, wanted [experts, out, in]", view.shape());
                return Err(wrong(&message));
            };
            let (each, stem) = (experts * parts.len(), name.trim_end_matches(end));
            let bytes = view.data().len() / each.max(1);
            for (i, data) in view.data().chunks_exact(bytes.max(1)).enumerate() {
                let (e, part) = (i / parts.len(), parts[i % parts.len()]);
                let shape = vec![rows / parts.len(), cols];
                let view = TensorView::new(view.dtype(), shape, data).map_err(|e| wrong(&e))?;
                stored.insert(format!("{stem}.{e}.{part}.weight"), (view, path));
            }
        }
    }
    Ok(())
}

/// The name under which a weight is stored, with the family's prefix or without.
fn stored_name<'a>(stored: &Tensors<'_>, family: &Family, name: &'a str) -> &'a str {
    let bare = name.strip_prefix(family.prefix).unwrap_or(name);
    if !stored.contains_key(name) && stored.contains_key(bare) { bare } else { name }
}

/// The name that a tensor of the text part of a model with others has in a model of text alone;
/// none for a tensor of the others. There are two spellings: `language_model.model.` and
/// `model.language_model.` (transformers 4.52).
fn text_name(name: &str) -> Option<String> {
    const OTHERS: [&str; 7] = [
        "vision_tower.",
        "vision_model.",
        "visual.",
        "audio_tower.",
        "multi_modal_projector.",
        "embed_vision.",
        "mtp.",
    ];
    let inner = name.strip_prefix("model.").unwrap_or(name);
    if OTHERS.iter().any(|other| inner.starts_with(other)) {
        return None;
    }
    match (inner.strip_prefix("language_model."), inner == name) {
        (Some(text), true) => Some(text.to_owned()),
        (Some(text), false) => Some(format!("model.{text}")),
        (None, _) => Some(name.to_owned()),
    }
}

/// Refuses a head of its own in the files of a model whose head is the token embedding: it would be
/// ignored. A copy of the embedding is none.
fn check_tied(family: &Family, spec: &Spec, stored: &Tensors<'_>) -> Result<()> {
    let name = stored_as(family, ParamKind::LmHead).map_or(LM_HEAD, |w| w.names[0]);
    let Some((view, path)) = stored.get(name) else { return Ok(()) };
    let layout = Layout::new(&Spec { layers: 0, ..spec.clone() }, Head::Lm);
    let tokens = layout.tensors().iter().find(|t| t.kind == ParamKind::Embedding);
    let tokens = tokens.and_then(|t| sources(family, t, spec).pop());
    let embedding = tokens.and_then(|t| stored.get(stored_name(stored, family, &t.name)));
    if embedding.is_none_or(|(e, _)| (e.dtype(), e.data()) == (view.dtype(), view.data())) {
        return Ok(());
    }
    let want = "a copy of the token embedding: `tie_word_embeddings` is true";
    Err(Error::file(*path, format!("`{name}` has other weights, wanted {want}")))
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
                let want = stored_shape(family, t, rows, t.cols);
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
pub(super) fn copy<T: Element>(
    out: &mut [T::Acc],
    places: &Places,
    rows: Range<usize>,
    view: &TensorView<'_>,
    transposed: Option<usize>,
) -> Result<(), String> {
    let (n, cols) = (rows.len(), places.cols.len());
    let plain = places.plain() && transposed.is_none();
    let place = |i: usize| {
        if plain {
            return rows.start * cols + i;
        }
        let (r, c) = match transposed {
            // Matrix by matrix, each column by column.
            Some(stack) => {
                let high = n / stack;
                (i / (high * cols) * high + i % high, i / high % cols)
            }
            None => (i / cols, i % cols),
        };
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
