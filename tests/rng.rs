//! Philox against Random123's known answers.

use warpo::rng::{Philox, Purpose, philox4x32};

#[test]
fn known_answers() {
    // kat_vectors of Random123 1.14, philox4x32 10
    assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(
        philox4x32([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
    );
    assert_eq!(
        philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
        [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
    );
}

/// Property 3: randomness is addressed, not consumed.
#[test]
fn randomness_is_addressed_not_consumed() {
    let a = Philox::new(7, 3, 11, Purpose::Sample);
    let forward: Vec<f32> = (0..100).map(|p| a.uniform(p)).collect();
    let b = Philox::new(7, 3, 11, Purpose::Sample);
    let backward: Vec<f32> = (0..100).rev().map(|p| b.uniform(p)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    for (seed, step, sample, purpose) in [
        (8, 3, 11, Purpose::Sample),
        (7, 4, 11, Purpose::Sample),
        (7, 3, 12, Purpose::Sample),
        (7, 3, 11, Purpose::Shuffle),
    ] {
        assert_ne!(Philox::new(seed, step, sample, purpose).block(0), a.block(0));
    }
}

#[test]
fn distributions() {
    let s = Philox::new(1, 0, 0, Purpose::Pairs);
    let n = 20_000;
    let u: Vec<f64> = (0..n).map(|i| f64::from(s.uniform(i))).collect();
    let mean = u.iter().sum::<f64>() / f64::from(n);
    assert!((mean - 0.5).abs() < 0.01 && u.iter().all(|u| (0.0..1.0).contains(u)), "{mean}");
    let z: Vec<f64> = (0..n).map(|i| s.normal(i)).collect();
    let var = z.iter().map(|z| z * z).sum::<f64>() / f64::from(n);
    assert!((var - 1.0).abs() < 0.04, "{var}");
    let mut hits = [0; 7];
    (0..n).for_each(|i| hits[s.below(i, 7) as usize] += 1);
    assert!(hits.iter().all(|h| (2600..3120).contains(h)), "{hits:?}");
    let mut p = s.permutation(100);
    assert_ne!(p, (0..100).collect::<Vec<_>>());
    p.sort_unstable();
    assert_eq!(p, (0..100).collect::<Vec<_>>());
}
