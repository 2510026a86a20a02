//! What a folder is that was named as a model's and has no model in it.

use std::path::Path;

use crate::error::Error;

/// An error of a folder that has no `file`, with what it has instead, if that is known.
pub(super) fn without(dir: &Path, file: &str, e: Error) -> Error {
    if dir.join(file).exists() || !dir.is_dir() {
        return e;
    }
    let has = |name: &str| dir.join(name).exists();
    let instead = if has("state.json") {
        "is a checkpoint: `warpo export` makes a model of it".into()
    } else if has("final/config.json") || has("final/adapter_config.json") {
        format!("is the folder of a run: its model is {}", dir.join("final").display())
    } else if let Some(name) = find(dir, &[".gguf"]) {
        format!("has its weights as {name} (GGUF), wanted safetensors as Hugging Face stores them")
    } else if let Some(name) = find(dir, &[".bin", ".pth", ".pt"]) {
        format!(
            "has its weights as {name}, which runs code when it is read, wanted safetensors: \
             transformers' save_pretrained writes them"
        )
    } else {
        return e;
    };
    Error::file(dir, format!("has no {file}: it {instead}"))
}

/// The first file of such an ending.
fn find(dir: &Path, ends: &[&str]) -> Option<String> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|f| f.ok()?.file_name().into_string().ok());
    names.filter(|name| ends.iter().any(|end| name.ends_with(end))).min()
}
