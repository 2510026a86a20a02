//! Model folders of random numbers, and prompts.

use std::{
    borrow::Cow,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};
use warpo::rng::{Philox, Purpose};

use super::{Shape, Work};

/// A folder that ends with this.
pub struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    /// `model` and `judge` of this shape, which share all but the judge's head, and
    /// `prompts.jsonl`.
    pub fn new(shape: &Shape, work: &Work) -> Self {
        let name = format!("warpo-engine-{}-{}", std::process::id(), shape.name);
        let this = Self(std::env::temp_dir().join(name));
        let (model, judge) = (this.model(), this.judge());
        for dir in [&model, &judge] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("config.json"), config(shape).to_string()).unwrap();
        }
        let (backbone, head) = ("model.safetensors", "score.safetensors");
        save(&model.join(backbone), tensors(shape));
        fs::hard_link(model.join(backbone), judge.join(backbone)).unwrap();
        let score = ("score.weight".to_owned(), vec![1, shape.hidden]);
        save(&judge.join(head), vec![score.clone()]);
        let mut map: Map<String, Value> =
            tensors(shape).into_iter().map(|(name, _)| (name, backbone.into())).collect();
        map.insert(score.0, head.into());
        let index = json!({ "weight_map": map }).to_string();
        fs::write(judge.join("model.safetensors.index.json"), index).unwrap();
        let text = (0..work.batch as u64).fold(String::new(), |mut text, i| {
            writeln!(text, "{{\"input_ids\": {:?}}}", ids(shape, work, i)).unwrap();
            text
        });
        fs::write(this.prompts(), text).unwrap();
        this
    }

    pub fn model(&self) -> PathBuf {
        self.0.join("model")
    }

    pub fn judge(&self) -> PathBuf {
        self.0.join("judge")
    }

    pub fn prompts(&self) -> PathBuf {
        self.0.join("prompts.jsonl")
    }
}

/// A random prompt.
pub fn ids(shape: &Shape, work: &Work, prompt: u64) -> Vec<u32> {
    let draw = Philox::new(2, prompt, 0, Purpose::Init);
    (0..work.prompt as u32).map(|i| draw.below(i, shape.vocab as u32)).collect()
}

fn config(s: &Shape) -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
        "vocab_size": s.vocab, "hidden_size": s.hidden, "num_hidden_layers": s.layers,
        "num_attention_heads": s.q_heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "intermediate_size": s.mlp, "hidden_act": "silu", "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true,
    })
}

/// Names and shapes of the backbone.
fn tensors(s: &Shape) -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (s.q_heads * s.head_dim, s.kv_heads * s.head_dim);
    let block = [
        ("input_layernorm", vec![s.hidden]),
        ("self_attn.q_proj", vec![q, s.hidden]),
        ("self_attn.k_proj", vec![kv, s.hidden]),
        ("self_attn.v_proj", vec![kv, s.hidden]),
        ("self_attn.o_proj", vec![s.hidden, q]),
        ("post_attention_layernorm", vec![s.hidden]),
        ("mlp.gate_proj", vec![s.mlp, s.hidden]),
        ("mlp.up_proj", vec![s.mlp, s.hidden]),
        ("mlp.down_proj", vec![s.hidden, s.mlp]),
    ];
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![s.vocab, s.hidden]),
        ("model.norm.weight".to_owned(), vec![s.hidden]),
    ];
    for layer in 0..s.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        all.extend(block.iter().map(|(part, shape)| (name(part), shape.clone())));
    }
    all
}

fn save(path: &Path, tensors: Vec<(String, Vec<usize>)>) {
    let tensors =
        tensors.into_iter().zip(1..).map(|((name, shape), seed)| (name, Random { shape, seed }));
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

/// A tensor that is drawn when it is written: ones for a norm, else numbers with a standard
/// deviation of 0.02.
struct Random {
    shape: Vec<usize>,
    seed: u64,
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let n: usize = self.shape.iter().product();
        if self.shape.len() == 1 {
            return Cow::Owned(bf16::ONE.to_le_bytes().repeat(n));
        }
        // Billions of numbers are wanted, and nobody looks at how they are distributed: splitmix64,
        // uniform, four at a time.
        let width = 0.02 * 12f32.sqrt();
        let mut out = Vec::with_capacity(2 * n + 8);
        let mut state = self.seed << 40;
        while out.len() < 2 * n {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            let z = z ^ z >> 31;
            for part in [z, z >> 16, z >> 32, z >> 48] {
                let x = width * (f32::from(part as u16) / 65_535.0 - 0.5);
                out.extend_from_slice(&bf16::from_f32(x).to_le_bytes());
            }
        }
        out.truncate(2 * n);
        Cow::Owned(out)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}
