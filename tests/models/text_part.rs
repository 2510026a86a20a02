//! The text part of a model that has others, by itself.

use serde_json::json;
use warpo::models::Head;

use super::{
    golden::load,
    weights::{Folder, Tensor},
};
use crate::support::assert_bits;

/// So transformers saves the text part of a model that it read whole; what predicts further tokens
/// is left out, as there.
#[test]
fn a_text_part_alone_may_have_the_names_of_the_whole() {
    let (mut folder, want) =
        (Folder::copy("text_part", "qwen3_5"), load::<f32>("qwen3_5", Head::Lm));
    let tensors = std::mem::take(&mut folder.tensors);
    let renamed =
        |(name, t): (String, Tensor)| (name.replacen("model.", "model.language_model.", 1), t);
    folder.tensors = tensors.into_iter().map(renamed).collect();
    folder.tensors.insert("mtp.fc.weight".into(), Tensor::f32(&[1], &[1.0]));
    let got = folder.write().load::<f32>(Head::Lm).unwrap();
    assert_bits("weights", got.params().flat().host(), want.params().flat().host());
}

#[test]
fn a_reward_model_inside_another_is_no_policy() {
    let mut folder = Folder::copy("nested_reward", "gemma3_nested");
    folder.config["architectures"] = json!(["Gemma3ForSequenceClassification"]);
    let e = folder.write().refused(Head::Lm);
    assert!(e.contains("`architectures` is Gemma3ForSequenceClassification"), "{e}");
}
