//! The order of examples: a permutation each epoch, a function of the counter alone.

use warpo::data::Order;

#[test]
fn every_epoch_is_a_permutation_of_its_own() {
    for len in [1, 2, 7, 100] {
        let mut order = Order::new(len, 3, true);
        let epochs: Vec<Vec<usize>> = (0..4)
            .map(|e| (0..len as u64).map(|i| order.index(e * len as u64 + i)).collect())
            .collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..len), "{epoch:?}");
        }
        if len == 100 {
            assert!(epochs.windows(2).all(|w| w[0] != w[1]));
            assert!(!epochs[0].iter().copied().eq(0..len), "it is shuffled");
            let other = Order::new(len, 4, true).batch(0, len);
            assert_ne!(epochs[0], other, "the seed decides");
        }
    }
}

#[test]
fn file_order_on_request() {
    let mut order = Order::new(3, 9, false);
    assert_eq!(order.batch(0, 4), [0, 1, 2, 0]);
    assert_eq!(order.batch(1, 4), [1, 2, 0, 1]);
}

/// Steps flow over the ends of epochs, and any step can be asked for first, or again.
#[test]
fn randomness_is_addressed_not_consumed() {
    let mut straight = Order::new(10, 5, true);
    let steps: Vec<Vec<usize>> = (0..25).map(|s| straight.batch(s, 4)).collect();
    let all = steps.concat();
    for epoch in all.chunks_exact(10) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..10));
    }
    for step in (0..25).rev() {
        assert_eq!(Order::new(10, 5, true).batch(step, 4), steps[step as usize]);
        assert_eq!(straight.batch(step, 4), steps[step as usize]);
    }
    // another batch size draws the same examples in the same order
    let mut other = Order::new(10, 5, true);
    assert_eq!((0..20).flat_map(|s| other.batch(s, 5)).collect::<Vec<_>>(), all);
}
