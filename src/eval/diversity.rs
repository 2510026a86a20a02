//! Diversity of texts.

use std::collections::HashSet;

/// Distinct n-grams of words over all n-grams, in 0..=1: a policy that says one thing again and
/// again comes near 0. (Li et al. 2016, "A Diversity-Promoting Objective Function", section 5.2)
///
/// Words are runs of letters and digits, in lower case; an n-gram stays within its text. Compare
/// only sets of texts of like size: the more words, the lower it gets.
///
/// ```
/// use warpo::eval::distinct;
/// assert_eq!(distinct(["Good, good", "so good"], 1), 0.5);
/// assert_eq!(distinct(["Good, good", "so good"], 2), 1.0);
/// ```
pub fn distinct<'a>(texts: impl IntoIterator<Item = &'a str>, n: usize) -> f64 {
    let (mut seen, mut all) = (HashSet::new(), 0usize);
    for text in texts {
        let words: Vec<String> = text
            .split(|c: char| !c.is_alphanumeric() && c != '\'')
            .filter(|w| !w.is_empty())
            .map(str::to_lowercase)
            .collect();
        for gram in words.windows(n.max(1)) {
            all += 1;
            seen.insert(gram.to_vec());
        }
    }
    if all == 0 { 0.0 } else { seen.len() as f64 / all as f64 }
}
