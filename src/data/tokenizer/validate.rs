//! What a tokenizer.json may do to a text: no chance, and no growth without bound.

use serde::Deserialize;
use serde_json::Value;

/// The most bytes that a byte of text may become.
const MOST_GROWTH: f64 = 256.0;
/// The most normalizers or decoders, one after another.
const MOST_STEPS: usize = 64;
/// The longest text that is put before every text, in bytes.
const LONGEST_PREFIX: usize = 64;

/// The parts that are looked at. The library reads all.
#[derive(Deserialize)]
struct TokenizerParts {
    normalizer: Option<Value>,
    decoder: Option<Value>,
    model: ModelPart,
}

#[derive(Deserialize)]
struct ModelPart {
    /// BPE: the chance with which a merge is left out.
    dropout: Option<f64>,
}

/// Checks the text of a `tokenizer.json`; the error says which part is refused and why.
pub(super) fn validate(text: &str) -> Result<(), String> {
    let parts: TokenizerParts =
        serde_json::from_str(text).map_err(|e| format!("not a tokenizer: {e}"))?;
    if let Some(p) = parts.model.dropout.filter(|p| *p != 0.0) {
        return Err(format!("`model.dropout` is {p}, wanted none: a text has one encoding"));
    }
    for (key, part) in [("normalizer", parts.normalizer), ("decoder", parts.decoder)] {
        let (growth, steps) = part.as_ref().map_or(Ok((1.0, 0)), |part| of_step(key, part))?;
        if growth > MOST_GROWTH || steps > MOST_STEPS {
            return Err(format!(
                "`{key}` makes up to {growth:.0} bytes of one in {steps} steps, wanted at most \
                 {MOST_GROWTH} in {MOST_STEPS}"
            ));
        }
    }
    Ok(())
}

/// The most bytes that a step makes of one, and how many steps it consists of.
fn of_step(key: &str, step: &Value) -> Result<(f64, usize), String> {
    let text = |name: &str| step[name].as_str().unwrap_or_default();
    let growth = match text("type") {
        "Sequence" => {
            let all = step[format!("{key}s")].as_array();
            return all.into_iter().flatten().try_fold((1.0, 0), |(growth, steps), step| {
                let (g, n) = of_step(key, step)?;
                Ok((growth * g, steps + n))
            });
        }
        "Replace" => {
            let content = text("content").len() as f64;
            match step["pattern"]["String"].as_str() {
                Some(pattern) if !pattern.is_empty() => content / pattern.len() as f64,
                // It may match nothing at all, between any two characters.
                _ => 1.0 + content,
            }
        }
        "Prepend" => {
            let n = text("prepend").len();
            if n > LONGEST_PREFIX {
                return Err(format!("`{key}` prepends {n} bytes, wanted at most {LONGEST_PREFIX}"));
            }
            1.0
        }
        "Precompiled" => longest_entry(text("precompiled_charsmap"))?,
        // One character for each byte.
        "ByteLevel" => 2.0,
        // Unicode's own forms: they grow a text once, whatever their number.
        _ => 1.0,
    };
    Ok((growth.max(1.0), 1))
}

/// The longest text that a map of SentencePiece has for a character, in bytes. In base64 stand the
/// bytes of a trie, their number before them, then the texts, each with a zero at its end. The
/// library takes memory for as long a trie as the number says.
fn longest_entry(base64: &str) -> Result<f64, String> {
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(base64.len() / 4 * 3), 0u32, 0);
    for c in base64.bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            // Padding; what is no base64 the library refuses.
            _ => break,
        };
        (bits, held) = (bits << 6 | u32::from(six), held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    let (size, rest) = bytes.split_at(bytes.len().min(4));
    let trie = size.try_into().map_or(0, u32::from_le_bytes) as usize;
    let Some(texts) = rest.get(trie..) else {
        let have = rest.len();
        return Err(format!("`precompiled_charsmap` has {have} bytes, wanted a trie of {trie}"));
    };
    Ok(texts.split(|b| *b == 0).map(<[u8]>::len).max().unwrap_or(0) as f64)
}
