//! Model folders: what is saved is loaded to the bit, every layout that Hugging Face stores is
//! read, and a folder that lies is refused by file and tensor, before memory is taken on its word.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use warpo::{
    Error,
    device::{Cpu, Device, Float},
    models::{self, Config, Head, Model, ParamKind, WEIGHTS},
    rng::{Philox, Purpose},
};

use super::golden::{MODELS, folders, load};
use crate::support::{assert_bits, golden, host, temp_dir};

/// A stored tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], x: &[f32]) -> Self {
        let data = bytemuck::cast_slice(x).to_vec();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    pub fn numbers(&self) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&self.data)
    }

    /// Each number rewritten in another format.
    fn map<const N: usize>(&self, dtype: Dtype, f: impl Fn(f32) -> [u8; N]) -> Self {
        let data = self.numbers().into_iter().flat_map(f).collect();
        Self { dtype, shape: self.shape.clone(), data }
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

fn write(path: &Path, tensors: &Tensors) {
    let mut views = Vec::new();
    for (name, t) in tensors {
        views.push((name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    }
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A new file: file systems flush what is written over an old one.
pub fn put(path: &Path, bytes: impl AsRef<[u8]>) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
}

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |t: &TensorView<'_>| Tensor {
        dtype: t.dtype(),
        shape: t.shape().to_vec(),
        data: t.data().to_vec(),
    };
    file.tensors().iter().map(|(name, t)| (name.clone(), tensor(t))).collect()
}

/// A folder that a test changes before it is loaded.
pub struct Folder {
    pub dir: PathBuf,
    pub config: Value,
    pub tensors: Tensors,
}

impl Folder {
    /// A copy of a golden folder, in a folder of the test's own.
    pub fn copy(test: &str, golden: &str) -> Self {
        let from = golden::path(golden);
        let config = std::fs::read_to_string(from.join("config.json")).unwrap();
        Self {
            dir: temp_dir(&format!("weights_{test}")),
            config: serde_json::from_str(&config).unwrap(),
            tensors: read(&from.join("model.safetensors")),
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.join("model.safetensors")
    }

    /// One file.
    pub fn write(&self) -> &Self {
        put(&self.dir.join("config.json"), self.config.to_string());
        write(&self.file(), &self.tensors);
        self
    }

    /// `n` shards and an index.
    fn write_shards(&self, n: usize) {
        put(&self.dir.join("config.json"), self.config.to_string());
        let mut index = serde_json::Map::new();
        for i in 0..n {
            let name = format!("model-{:05}-of-{n:05}.safetensors", i + 1);
            let part: Tensors = self.tensors.clone().into_iter().skip(i).step_by(n).collect();
            index.extend(part.keys().map(|k| (k.clone(), json!(name))));
            write(&self.dir.join(name), &part);
        }
        self.write_index(&json!({ "metadata": {}, "weight_map": index }).to_string());
    }

    fn write_index(&self, text: &str) {
        put(&self.dir.join("model.safetensors.index.json"), text);
    }

    pub fn load<F: Float>(&self, head: Head) -> Result<Model<F>, Error> {
        // no threads: many folders are refused before there is work
        Model::load(&Device::Cpu(Cpu::new(1)), &self.dir, head, Some(0))
    }

    /// Loads, and must be refused; the message, with the folder's name left out.
    #[track_caller]
    pub fn refused(&self, head: Head) -> String {
        let error = self.load::<f32>(head).unwrap_err();
        assert!(matches!(error, Error::File { .. } | Error::Io { .. }), "{error:?}");
        error.to_string().replace(self.dir.to_str().unwrap(), "DIR")
    }
}

fn flat<F: Float>(model: &Model<F>) -> &[F] {
    model.params().flat().host()
}

/// Saving what was loaded gives the file that Hugging Face wrote: names, shapes, bytes.
#[test]
fn what_is_saved_is_what_hugging_face_stored() {
    let dir = temp_dir("weights_saved");
    for name in folders() {
        for (folder, head) in [(name.to_owned(), Head::Lm), (format!("{name}/rm"), Head::Scalar)] {
            if !golden::path(&folder).exists() {
                continue;
            }
            let model = load::<f32>(&folder, head);
            models::save(host(), &model, &dir).unwrap();
            let from = golden::path(&folder);
            let again = Model::<f32>::load(&Device::cpu(), &dir, head, Some(0)).unwrap();
            assert_bits(&folder, flat(&again), flat(&model));
            assert_eq!(again.spec(), model.spec());
            let file = "model.safetensors";
            let (ours, theirs) = (read(&dir.join(file)), read(&from.join(file)));
            // The text part is a model of its own, by the names of one.
            if model.config().is_nested() {
                let inner = |k: &String| k.starts_with("language_model.");
                let texts = theirs.keys().filter(|k| inner(k)).count();
                let score = usize::from(head == Head::Scalar);
                assert_eq!(ours.len(), texts + score, "{folder}");
                assert!(ours.keys().all(|k| !k.contains("vision") && !inner(k)), "{folder}");
                continue;
            }
            assert!(ours == theirs, "{folder}");
            let json = |dir: &Path| -> Value {
                serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
            };
            let (mut saved, stored) = (json(&dir), json(&from));
            if head == Head::Scalar {
                assert_eq!(saved.as_object_mut().unwrap().remove("num_labels"), Some(json!(1)));
            }
            assert_eq!(saved, stored, "{folder}");
        }
    }
}

/// A value model made of a policy is one that Hugging Face loads; f64 weights stay f64.
#[test]
fn a_new_head_and_a_new_dtype_stand_in_the_saved_config() {
    let dir = temp_dir("weights_new_head");
    for name in MODELS {
        let from = golden::path(name);
        let value = Model::<f64>::load(&Device::cpu(), &from, Head::Scalar, Some(3)).unwrap();
        models::save(host(), &value, &dir).unwrap();
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let architecture = if name == "gpt2" { "GPT2" } else { "Llama" };
        let architecture = format!("{architecture}ForSequenceClassification");
        assert_eq!(config["architectures"], json!([architecture]));
        assert_eq!((&config["num_labels"], &config["dtype"]), (&json!(1), &json!("float64")));
        // what a batch of several texts is padded with
        let stored = Config::read(&from).unwrap();
        let eos = stored
            .json()
            .get("pad_token_id")
            .filter(|v| !v.is_null())
            .unwrap_or(&stored.json()["eos_token_id"]);
        assert_eq!(&config["pad_token_id"], eos);
        let score = &read(&dir.join("model.safetensors"))["score.weight"];
        assert_eq!((score.dtype, &score.shape[..]), (Dtype::F64, &[1, value.spec().hidden][..]));
        let again = Model::<f64>::load(&Device::cpu(), &dir, Head::Scalar, None).unwrap();
        assert_bits(name, flat(&again), flat(&value));
    }
}

/// A single file is the model, whatever an index beside it names; so transformers has it.
#[test]
fn a_single_file_is_taken_before_shards() {
    let mut folder = Folder::copy("single_first", "llama");
    folder.write();
    folder.tensors.values_mut().for_each(|t| t.data.fill(0));
    folder.write_shards(2);
    let model = folder.load::<f32>(Head::Lm).unwrap();
    assert_bits("the single file's", flat(&model), flat(&load::<f32>("llama", Head::Lm)));
    folder.write_index("{");
    folder.load::<f32>(Head::Lm).unwrap();
}

/// A head of its own is not dropped where the config says that there is none.
#[test]
fn a_head_beside_a_tied_embedding_is_a_copy_or_refused() {
    let mut folder = Folder::copy("tied_head", "llama_tied");
    let mut head = folder.tensors["model.embed_tokens.weight"].clone();
    folder.tensors.insert("lm_head.weight".into(), head.clone());
    let model = folder.write().load::<f32>(Head::Lm).unwrap();
    assert_bits("a copy", flat(&model), flat(&load::<f32>("llama_tied", Head::Lm)));
    *head.data.last_mut().unwrap() ^= 1;
    folder.tensors.insert("lm_head.weight".into(), head);
    let want = "DIR/model.safetensors: `lm_head.weight` has other weights, wanted a copy of the \
                token embedding: `tie_word_embeddings` is true";
    assert_eq!(folder.write().refused(Head::Lm), want);
}

#[test]
fn shards_are_one_model() {
    for n in [1, 3, 40] {
        let folder = Folder::copy("shards", "llama");
        folder.write_shards(n);
        assert!(!folder.file().exists());
        let model = folder.load::<f32>(Head::Lm).unwrap();
        assert_bits(&n.to_string(), flat(&model), flat(&load::<f32>("llama", Head::Lm)));
    }
}

/// Each stored format is widened exactly; f64 is rounded once.
#[test]
fn half_precision_widens_exactly() {
    let mut folder = Folder::copy("half", "llama_tied");
    let plain = folder.tensors.clone();
    // the largest, the smallest normal, subnormals, negative zero
    let edges = [65504.0, 6.1035e-5, 5.9604645e-8, -3.0e-6, -0.0, f32::from_bits(1)];
    let edge = |i: usize, x: f32| edges.get(i).copied().unwrap_or(x);
    type Round = fn(f32) -> Vec<u8>;
    type Widen = fn(&[u8]) -> f32;
    let formats: [(Dtype, Round, Widen); 3] = [
        (
            Dtype::BF16,
            |x| bf16::from_f32(x).to_le_bytes().to_vec(),
            |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        ),
        (
            Dtype::F16,
            |x| f16::from_f32(x).to_le_bytes().to_vec(),
            |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        ),
        (
            Dtype::F64,
            |x| (f64::from(x) * (1.0 + 1e-9)).to_le_bytes().to_vec(),
            |b| f64::from_le_bytes(b.try_into().unwrap()) as f32,
        ),
    ];
    for (dtype, round, widen) in formats {
        let mut want = BTreeMap::new();
        for (name, t) in &plain {
            let x = t.numbers().into_iter().enumerate();
            let stored: Vec<Vec<u8>> = x.map(|(i, x)| round(edge(i, x))).collect();
            want.insert(name.clone(), stored.iter().map(|b| widen(b)).collect::<Vec<f32>>());
            let data = stored.concat();
            folder.tensors.insert(name.clone(), Tensor { dtype, shape: t.shape.clone(), data });
        }
        let model = folder.write().load::<f32>(Head::Lm).unwrap();
        for (name, _, got) in models::named(host(), &model, model.params()).unwrap() {
            assert_bits(&format!("{dtype:?} {name}"), &got, &want[&name]);
        }
    }
}

/// GPT-2 stores the linear weights of a block `[in, out]`; ours are `[out, in]`, fused in order.
#[test]
fn rows_are_where_the_formulas_want_them() {
    let stored = Folder::copy("rows", "gpt2").tensors;
    let model = load::<f32>("gpt2", Head::Lm);
    for (kind, name) in [
        (ParamKind::Qkv, "attn.c_attn"),
        (ParamKind::Out, "attn.c_proj"),
        (ParamKind::Up, "mlp.c_fc"),
        (ParamKind::Down, "mlp.c_proj"),
    ] {
        let t = &stored[&format!("transformer.h.1.{name}.weight")];
        let (x, ours) = (t.numbers(), model.params().get(kind, Some(1)).unwrap().host());
        let (k, n) = (t.shape[0], t.shape[1]);
        for (i, o) in (0..k).flat_map(|i| (0..n).map(move |o| (i, o))) {
            assert_eq!(ours[o * k + i].to_bits(), x[i * n + o].to_bits(), "{name} {i} {o}");
        }
    }
    let stored = Folder::copy("rows", "llama").tensors;
    let model = load::<f32>("llama", Head::Lm);
    for (kind, parts) in [
        (ParamKind::Qkv, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
        (ParamKind::Up, &["mlp.gate_proj", "mlp.up_proj"]),
        (ParamKind::Down, &["mlp.down_proj"]),
    ] {
        let part = |p: &&str| stored[&format!("model.layers.1.{p}.weight")].numbers();
        let all: Vec<f32> = parts.iter().flat_map(part).collect();
        assert_bits(parts[0], model.params().get(kind, Some(1)).unwrap().host(), &all);
    }
}

/// Gradients of a weight and its bias are borrowed by one split of the flat buffer.
#[test]
fn a_bias_follows_its_weight() {
    for pair in WEIGHTS.windows(2).filter(|pair| pair[0].bias.is_some()) {
        assert_eq!(pair[0].bias, Some(pair[1].kind));
        let outputs = if pair[0].rows == pair[1].rows { pair[0].cols } else { pair[0].rows };
        assert_eq!(pair[1].cols, outputs, "{:?}", pair[1].kind);
    }
}

#[test]
fn the_prefix_may_be_missing() {
    for (name, prefix) in [("gpt2", "transformer."), ("llama", "model.")] {
        let mut folder = Folder::copy("prefix", name);
        let bare = |n: String| n.strip_prefix(prefix).map(str::to_owned).unwrap_or(n);
        folder.tensors = folder.tensors.into_iter().map(|(n, t)| (bare(n), t)).collect();
        let model = folder.write().load::<f32>(Head::Lm).unwrap();
        assert_bits(name, flat(&model), flat(&load::<f32>(name, Head::Lm)));
    }
    // the same weight under both names: which one is meant?
    let mut folder = Folder::copy("prefix", "llama");
    let norm = folder.tensors["model.norm.weight"].clone();
    folder.tensors.insert("norm.weight".into(), norm);
    assert_eq!(
        folder.write().refused(Head::Lm),
        "DIR/model.safetensors: `norm.weight` is no weight of a llama model"
    );
}

/// Where the head is tied, the embedding is the head; where it is not, its own weight is.
#[test]
fn a_tied_head_is_the_embedding() {
    let mut folder = Folder::copy("tied", "llama_tied");
    let embedding = folder.tensors["model.embed_tokens.weight"].clone();
    let tied = folder.write().load::<f32>(Head::Lm).unwrap();
    assert_bits("head", tied.lm_head(host()).unwrap().weight.host(), &embedding.numbers());

    let other = Tensor::f32(&embedding.shape, &vec![7.0; embedding.numbers().len()]);
    folder.tensors.insert("lm_head.weight".into(), other);
    folder.config["tie_word_embeddings"] = json!(false);
    let untied = folder.write().load::<f32>(Head::Lm).unwrap();
    assert!(untied.lm_head(host()).unwrap().weight.host().iter().all(|x| *x == 7.0));

    // GPT-2 with a head of its own, which is stored `[out, in]` as everywhere
    let mut folder = Folder::copy("tied", "gpt2");
    let wte = folder.tensors["transformer.wte.weight"].clone();
    let head: Vec<f32> = (0..wte.numbers().len()).map(|i| i as f32).collect();
    folder.tensors.insert("lm_head.weight".into(), Tensor::f32(&wte.shape, &head));
    folder.config["tie_word_embeddings"] = json!(false);
    let untied = folder.write().load::<f32>(Head::Lm).unwrap();
    assert_bits("gpt2 head", untied.lm_head(host()).unwrap().weight.host(), &head);
}

/// N(0, 1/(hidden + 1)) of the seed, where the folder has no scalar head; the stored one where it
/// has.
#[test]
fn a_scalar_head_is_read_or_drawn() {
    for name in MODELS {
        let path = golden::path(name);
        let draw = |seed| {
            let model =
                Model::<f32>::load(&Device::cpu(), &path, Head::Scalar, Some(seed)).unwrap();
            model.score_head().unwrap().host().to_vec()
        };
        let head = draw(5);
        let normal = Philox::new(5, 0, 0, Purpose::Init);
        let std = 1.0 / ((head.len() + 1) as f64).sqrt();
        let want: Vec<f32> =
            (0..head.len()).map(|i| (std * normal.normal(i as u32)) as f32).collect();
        assert_bits(name, &head, &want);
        assert_ne!(head, draw(6));

        let folder = Folder::copy("scalar", &format!("{name}/rm"));
        let stored = folder.tensors["score.weight"].numbers();
        let model = folder.write().load::<f32>(Head::Scalar).unwrap();
        assert_bits(name, model.score_head().unwrap().host(), &stored);
    }
}

#[test]
fn a_model_has_one_head() {
    let judge = load::<f32>("llama/rm", Head::Scalar);
    let error = judge.lm_head(host()).unwrap_err().to_string();
    assert_eq!(error, "head: got a scalar head, wanted an LM head");
    let error = load::<f32>("llama", Head::Lm).score_head().unwrap_err().to_string();
    assert_eq!(error, "head: got an LM head, wanted a scalar head");
}

/// Property 10: file, tensor, what was wanted and what came.
#[test]
fn a_wrong_tensor_is_named() {
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut folder = Folder::copy("wrong_tensor", "llama_tied");
        change(&mut folder.tensors);
        folder.write().refused(Head::Lm)
    };
    let norm = "model.layers.2.input_layernorm.weight";
    let get = |t: &Tensors| t[norm].numbers();
    let put = |t: &mut Tensors, shape: &[usize], x: &[f32]| {
        t.insert(norm.into(), Tensor::f32(shape, x));
    };
    let file = format!("DIR/model.safetensors: `{norm}`");
    assert_eq!(with(&|t| drop(t.remove(norm))), format!("DIR: `{norm}` is missing"));
    assert_eq!(
        with(&|t| put(t, &[35], &get(t)[1..])),
        format!("{file} has shape [35], wanted [36]")
    );
    assert_eq!(
        with(&|t| put(t, &[6, 6], &get(t))),
        format!("{file} has shape [6, 6], wanted [36]")
    );
    assert_eq!(with(&|t| put(t, &[0], &[])), format!("{file} has shape [0], wanted [36]"));
    for (i, bad) in [(0, f32::NAN), (17, f32::INFINITY), (35, f32::NEG_INFINITY)] {
        let change = |t: &mut Tensors| {
            let mut x = get(t);
            x[i] = bad;
            put(t, &[36], &x);
        };
        assert_eq!(with(&change), format!("{file} has {bad} at element {i}, wanted finite F32"));
    }
    // finite as it is stored, but not in f32
    let big = |t: &mut Tensors| {
        let wide = t[norm].map(Dtype::F64, |x| (f64::from(x) * 1e39).to_le_bytes());
        t.insert(norm.into(), wide);
    };
    assert!(with(&big).ends_with("at element 0, wanted finite F32"), "{}", with(&big));
    let whole = |t: &mut Tensors| {
        let ints = t[norm].map(Dtype::I64, |x| (x as i64).to_le_bytes());
        t.insert(norm.into(), ints);
    };
    assert_eq!(with(&whole), format!("{file} is I64, wanted F32, F16, BF16 or F64"));
    let extra =
        |t: &mut Tensors| drop(t.insert("model.norm.bias".into(), Tensor::f32(&[1], &[0.0])));
    let want = "DIR/model.safetensors: `model.norm.bias` is no weight of a llama model";
    assert_eq!(with(&extra), want);
    // a matrix the wrong way round
    let turned = |t: &mut Tensors| {
        t.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().shape.reverse();
    };
    let want = "DIR/model.safetensors: `model.layers.0.mlp.up_proj.weight` has shape [36, 52], \
                wanted [52, 36]";
    assert_eq!(with(&turned), want);
    // a language model wanted of a reward model
    let folder = Folder::copy("wrong_tensor", "llama/rm");
    let want = "DIR/config.json: `architectures` is LlamaForSequenceClassification, wanted a \
                language model: it is a reward model";
    assert_eq!(folder.write().refused(Head::Lm), want);
    // two labels are no score
    let mut folder = Folder::copy("wrong_tensor", "llama_tied/rm");
    let two = Tensor::f32(&[2, 36], &[0.5; 72]);
    folder.tensors.insert("score.weight".into(), two);
    let want = "DIR/model.safetensors: `score.weight` has shape [2, 36], wanted [36]";
    assert_eq!(folder.write().refused(Head::Scalar), want);
}

#[test]
fn a_wrong_file_is_named() {
    let folder = Folder::copy("wrong_file", "llama_tied");
    let no = "No such file or directory (os error 2)";
    assert_eq!(folder.refused(Head::Lm), format!("cannot read DIR/config.json: {no}"));
    folder.write();
    std::fs::remove_file(folder.file()).unwrap();
    assert_eq!(folder.refused(Head::Lm), format!("cannot read DIR/model.safetensors: {no}"));
    for junk in
        [&b""[..], b"x", b"PK\x03\x04pickle", &[0; 64], &[0xFF; 64], b"\x02\0\0\0\0\0\0\0{}"]
    {
        put(&folder.file(), junk);
        let message = folder.refused(Head::Lm);
        let want = match junk.ends_with(b"{}") {
            true => "DIR/config.json: `number of layers` is 3, wanted at most the number of stored",
            false => "DIR/model.safetensors: no safetensors file: ",
        };
        assert!(message.starts_with(want), "{junk:?}: {message}");
    }
    put(&folder.file(), "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    let want =
        "DIR/model.safetensors: is a Git LFS pointer, wanted the weights: `git lfs pull` gets them";
    assert_eq!(folder.refused(Head::Lm), want);
    // a shape that does not fill its bytes is named
    folder.write();
    let file = std::fs::read(folder.file()).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header =
        String::from_utf8(file[8..end].to_vec()).unwrap().replacen("[113,36]", "[112,36]", 1);
    put(&folder.file(), [&file[..8], header.as_bytes(), &file[end..]].concat());
    let message = folder.refused(Head::Lm);
    assert!(message.ends_with(" (`model.embed_tokens.weight`)"), "{message}");
    for text in ["", "{", "[]", "7", "{\"model_type\": 7}"] {
        put(&folder.dir.join("config.json"), text);
        let message = folder.refused(Head::Lm);
        assert!(message.starts_with("DIR/config.json: "), "{message}");
    }
    std::fs::write(folder.dir.join("config.json"), " ".repeat((1 << 20) + 1)).unwrap();
    let want = "DIR/config.json: 1048577 bytes long, wanted at most 1048576";
    assert_eq!(folder.refused(Head::Lm), want);
}

/// Truncations, and flipped bits in the header: refused, or the same weights.
#[test]
fn a_torn_file_is_refused() {
    let folder = Folder::copy("torn", "llama_tied");
    folder.write();
    let bytes = std::fs::read(folder.file()).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let ends = (0..header).step_by(31).chain((header..bytes.len()).step_by(4099));
    for end in ends.chain([header - 1, header, bytes.len() - 1]) {
        put(&folder.file(), &bytes[..end]);
        let message = folder.refused(Head::Lm);
        let of = format!("it has {end} bytes, its header tells of {}", bytes.len());
        let want =
            if end < header { "no safetensors file: " } else { &format!("is cut off: {of}") };
        let want = format!("DIR/model.safetensors: {want}");
        assert!(message.starts_with(&want), "{end}: {message}");
    }
    let want = load::<f32>("llama_tied", Head::Lm);
    let mut torn = bytes.clone();
    for at in (0..8).chain((8..header).step_by(3)) {
        torn[at] = bytes[at] ^ 1 << (at % 7);
        put(&folder.file(), &torn);
        match folder.load::<f32>(Head::Lm) {
            Ok(model) => assert_bits(&at.to_string(), flat(&model), flat(&want)),
            Err(error) => assert!(matches!(error, Error::File { .. }), "{at}: {error:?}"),
        }
        torn[at] = bytes[at];
    }
}

#[test]
fn a_wrong_index_is_named() {
    let folder = Folder::copy("wrong_index", "llama_tied");
    folder.write_shards(2);
    let index = "DIR/model.safetensors.index.json";
    folder.write_index("{\"weight_map\": ");
    assert!(folder.refused(Head::Lm).starts_with(&format!("{index}: not JSON: ")));
    for text in ["{}", "[]", "{\"weight_map\": [1]}"] {
        folder.write_index(text);
        assert_eq!(folder.refused(Head::Lm), format!("{index}: `weight_map` is missing"));
    }
    // no path leads out of the folder
    for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", "shard/"] {
        folder.write_index(&json!({"weight_map": {"t": name}}).to_string());
        let want = format!("{index}: shard of `t` is {name:?}, wanted a file name");
        assert_eq!(folder.refused(Head::Lm), want);
    }
    folder.write_index(&json!({"weight_map": {"t": 7}}).to_string());
    let want = format!("{index}: shard of `t` is \"\", wanted a file name");
    assert_eq!(folder.refused(Head::Lm), want);
    folder.write_index(&json!({"weight_map": {"t": "gone.safetensors"}}).to_string());
    let want = "cannot read DIR/gone.safetensors: No such file or directory (os error 2)";
    assert_eq!(folder.refused(Head::Lm), want);

    // a tensor in two shards, and one in none
    folder.write_shards(2);
    let second = folder.dir.join("model-00002-of-00002.safetensors");
    let mut part = read(&second);
    let (name, tensor) = part.pop_last().unwrap();
    write(&second, &part);
    let shard = "model-00002-of-00002.safetensors";
    assert_eq!(folder.refused(Head::Lm), format!("{index}: `{name}` is not in {shard}"));
    part.insert(name, tensor);
    let twice = "model.embed_tokens.weight";
    part.insert(twice.into(), folder.tensors[twice].clone());
    write(&second, &part);
    let want = format!("DIR/model-00002-of-00002.safetensors: `{twice}` is in two shards");
    assert_eq!(folder.refused(Head::Lm), want);
}

/// A FIFO in a folder would keep a reader waiting for ever.
#[test]
fn what_is_no_regular_file_is_refused() {
    for name in ["config.json", "model.safetensors"] {
        let folder = Folder::copy("fifo", "llama_tied");
        folder.write();
        let path = folder.dir.join(name);
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = folder.refused(Head::Lm);
        assert_eq!(error, format!("DIR/{name}: is no regular file"));
    }
}
