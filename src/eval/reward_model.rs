//! A model that rates what another one writes.

use std::path::Path;

use crate::{
    data::Tokenizer,
    device::{Device, Element},
    error::{Error, Result},
    models::{Head, LoadOptions, Model, Spec, load, text_folder},
};

/// Loads the reward model in `dir`, which shall rate texts of up to `longest` tokens by a policy.
pub fn load_reward_model<T: Element>(
    dev: &Device,
    dir: &Path,
    policy: &Spec,
    tokenizer: Option<&Tokenizer>,
    longest: usize,
) -> Result<Model<T>> {
    let options = LoadOptions { longest: Some(longest), ..LoadOptions::frozen(Head::Scalar) };
    let model = load(dev, dir, options)?;
    check_reward_model(dir, model.spec(), policy, tokenizer, longest)?;
    Ok(model)
}

/// Whether the reward model in `dir`, of this spec, can rate texts of up to `longest` tokens by a
/// policy.
pub fn check_reward_model(
    dir: &Path,
    spec: &Spec,
    policy: &Spec,
    tokenizer: Option<&Tokenizer>,
    longest: usize,
) -> Result<()> {
    let (want, got) = (policy.vocab, spec.vocab);
    if want != got {
        return Err(Error::file(
            dir,
            format!("has a vocabulary of {got}, the policy one of {want}"),
        ));
    }
    let most = spec.max_positions;
    if most < longest {
        let message = format!("reads texts of up to {most} tokens, the policy writes {longest}");
        return Err(Error::file(dir, message));
    }
    tokenizer.map_or(Ok(()), |t| t.agrees(&text_folder(dir, None)?))
}
