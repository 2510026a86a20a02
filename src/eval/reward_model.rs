//! A model that rates what another one writes.

use std::path::Path;

use crate::{
    data::Tokenizer,
    device::{Device, Element},
    error::{Error, Result},
    models::{Head, Model, Spec},
};

/// Loads the reward model in `dir`, which shall rate texts of up to `longest` tokens by a policy.
///
/// # Errors
/// [`Error::File`] if it has no scalar head, another vocabulary or tokenizer than the policy, or too
/// few positions; those of [`Model::load`].
pub fn load_reward_model<T: Element>(
    dev: &Device,
    dir: &Path,
    policy: &Spec,
    tokenizer: Option<&Tokenizer>,
    longest: usize,
) -> Result<Model<T>> {
    let model = Model::load(dev, dir, Head::Scalar, None)?;
    let (want, got) = (policy.vocab, model.spec().vocab);
    if want != got {
        return Err(Error::file(
            dir,
            format!("has a vocabulary of {got}, the policy one of {want}"),
        ));
    }
    let most = model.spec().max_positions;
    if most < longest {
        let message = format!("reads texts of up to {most} tokens, the policy writes {longest}");
        return Err(Error::file(dir, message));
    }
    tokenizer.map_or(Ok(()), |t| t.agrees(dir))?;
    Ok(model)
}
