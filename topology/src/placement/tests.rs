//! Placements against every possible one, on machines small enough to try all.

use proptest::prelude::*;

use super::*;

const GROUPS_OF_FOUR: [usize; 5] = [0, 1, 2, 3, 4];

fn layer(frequencies: &[f32]) -> LayerLoad {
    LayerLoad {
        fixed_bytes: 100,
        scanned_bytes: 10,
        active_bytes: 20,
        bundle_bytes: 30,
        frequencies: frequencies.to_vec(),
    }
}

fn device(bytes_per_s: f64, budget_bytes: u64, granule_bytes: u64) -> DeviceSpeed {
    DeviceSpeed {
        bytes_per_s,
        budget_bytes,
        granule_bytes,
        launch_s: 0.0,
    }
}

fn node(bytes_per_s: f64) -> NodeSpeed {
    NodeSpeed {
        bytes_per_s,
        budget_bytes: 1 << 40,
        granule_bytes: 1,
    }
}

fn machine(devices: Vec<DeviceSpeed>, nodes: Vec<NodeSpeed>) -> MachineSpeed {
    MachineSpeed {
        devices,
        nodes,
        hand_off_s: 0.001,
    }
}

fn hot_bytes(
    layers: &[LayerLoad],
    placements: &[LayerPlacement],
    machine: &MachineSpeed,
    device: usize,
) -> u64 {
    let granule = machine.devices[device].granule_bytes;
    let each = layers.iter().zip(placements).map(|(layer, placement)| {
        (placement.hot_ids[device].len() as u64 * layer.bundle_bytes).next_multiple_of(granule)
    });
    each.sum()
}

#[test]
fn without_a_device_nodes_own_whole_groups_in_proportion_to_their_speed() {
    let layers = [layer(&[0.5; 16])];
    let ends: Vec<usize> = (0..=16).collect();
    let placed = solve(&layers, &machine(vec![], vec![node(3.0), node(1.0)]), &ends).unwrap();
    assert_eq!(
        placed[0].cold,
        [ColdShare::Groups(0..12), ColdShare::Groups(12..16)]
    );
    assert!(placed[0].hot_ids.is_empty());
}

#[test]
fn the_most_frequent_neurons_are_hot_and_every_neuron_lives_once() {
    let layers = [layer(&[0.1, 0.9, 0.3, 0.8]), layer(&[0.2, 0.1, 0.1, 0.1])];
    // room for two neurons: 60 bytes of 30 each
    let machine = machine(vec![device(1e9, 60, 30)], vec![node(1e3), node(1e3)]);
    // 16 neurons would move together: with room for two it is those two
    let placed = solve(&layers, &machine, &GROUPS_OF_FOUR).unwrap();
    assert_eq!(placed[0].hot_ids, [vec![1, 3]]);
    assert_eq!(placed[1].hot_ids, [Vec::<u32>::new()]);
    for (layer, placement) in layers.iter().zip(&placed) {
        let mut ids: Vec<u32> = placement.hot_ids.concat();
        for share in &placement.cold {
            let ColdShare::Ids(cold) = share else {
                panic!("{share:?}")
            };
            ids.extend(cold);
        }
        ids.sort_unstable();
        let all: Vec<u32> = (0..layer.frequencies.len() as u32).collect();
        assert_eq!(ids, all);
    }
}

#[test]
fn a_slow_device_takes_only_what_it_finishes_first() {
    let layers = [layer(&[0.5; 64])];
    // a device as fast as the node, and room for everything: half each
    let mut machine = machine(vec![device(1000.0, 1 << 20, 1)], vec![node(1000.0)]);
    let ends = [0, 64];
    let placed = solve(&layers, &machine, &ends).unwrap();
    assert_eq!(placed[0].hot_ids[0].len(), 32);
    // 64 · 20 bytes by one of them take 0.64 s more than by both: less than a hand-off does
    machine.hand_off_s = 0.65;
    let placed = solve(&layers, &machine, &ends).unwrap();
    assert_eq!(placed[0].hot_ids[0].len(), 64);
    machine.hand_off_s = 0.63;
    let placed = solve(&layers, &machine, &ends).unwrap();
    assert_eq!(placed[0].hot_ids[0].len(), 32);
}

#[test]
fn only_layers_with_cold_neurons_pay_a_hand_off_to_a_device() {
    let layers = [layer(&[0.9, 0.9, 0.1, 0.1]), layer(&[0.9, 0.9, 0.1, 0.1])];
    let placed = |hand_off_s: f64| {
        // room for four neurons of eight
        let machine = MachineSpeed {
            hand_off_s,
            ..machine(vec![device(1e9, 120, 1)], vec![node(100.0)])
        };
        let hot = hot::choose_by(&layers, &machine, 1).into_iter();
        let placed: Vec<LayerPlacement> = hot
            .map(|hot| LayerPlacement {
                cold: vec![ColdShare::Ids(hot.cold_ids(4))],
                hot_ids: hot.into_ids(),
            })
            .collect();
        let time = TokenTime::of(&layers, &placed, &machine, &[0, 4], 0);
        let hot = placed.iter().map(|layer| layer.hot_ids[0].len());
        let paid = time.layers.iter().map(|layer| layer.hand_off_s);
        (hot.collect::<Vec<_>>(), paid.collect::<Vec<_>>())
    };
    // what fires most, wherever it is
    assert_eq!(placed(0.001), (vec![2, 2], vec![0.001; 2]));
    // one layer whole, so that one hand-off is enough
    assert_eq!(placed(1.0), (vec![4, 0], vec![0.0, 1.0]));
    // the host as the device hands over in every layer
    let host = machine(vec![], vec![node(100.0)]);
    let placed = solve(&layers, &host, &GROUPS_OF_FOUR).unwrap();
    let time = TokenTime::of(&layers, &placed, &host, &GROUPS_OF_FOUR, 0);
    assert!(time.layers.iter().all(|layer| layer.hand_off_s == 0.001));
}

#[test]
fn a_node_without_room_is_named() {
    let layers = [layer(&[0.5; 4])];
    let mut small = node(1.0);
    small.budget_bytes = 119;
    small.granule_bytes = 1;
    let error = solve(&layers, &machine(vec![], vec![small]), &GROUPS_OF_FOUR).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the cold neurons of layer 0 take 120 bytes on node 0, where 119 of 119 are left: use more nodes, a smaller \
         model or type, or a device with more memory"
    );
}

#[test]
fn a_small_node_takes_what_it_has_room_for_in_every_layer() {
    let layers = vec![layer(&[0.5; 16]); 3];
    let ends: Vec<usize> = (0..=16).collect();
    // twice as fast, with room for four of 16 neurons a layer; granules of two neurons
    let mut fast = node(2.0);
    fast.budget_bytes = 3 * 4 * 30;
    fast.granule_bytes = 60;
    for devices in [vec![], vec![device(1e3, 0, 1)]] {
        let placed = solve(
            &layers,
            &machine(devices, vec![fast.clone(), node(1.0)]),
            &ends,
        )
        .unwrap();
        for placement in placed {
            assert_eq!(placement.cold[0].n_neurons(&ends), 4);
            assert_eq!(placement.cold[1].n_neurons(&ends), 12);
        }
    }
}

#[test]
fn numbers_that_cannot_be_are_named() {
    let machine = machine(vec![], vec![node(1.0)]);
    let error = solve(&[layer(&[0.5, f32::NAN])], &machine, &[0, 2]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a frequency of layer 0 is NaN: it has to be from 0 to 1"
    );
    let slow = MachineSpeed {
        nodes: vec![node(0.0)],
        ..machine
    };
    let error = solve(&[], &slow, &[0]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the bandwidth of node 0 is 0: it has to be positive"
    );
}

#[test]
fn the_parts_add_up_and_the_bottleneck_comes_first() {
    let layers = [layer(&[0.5; 4]), layer(&[0.0; 4])];
    let machine = machine(vec![], vec![node(1000.0), node(500.0)]);
    let placed = solve(&layers, &machine, &GROUPS_OF_FOUR).unwrap();
    let time = TokenTime::of(&layers, &placed, &machine, &GROUPS_OF_FOUR, 1500);
    let parts = time.parts();
    let sum: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    assert!((sum - time.total_s()).abs() < 1e-12);
    // 1500 bytes at 1500 bytes a second
    assert_eq!(parts[0], (Part::Head, 1.0));
    // 2 layers · 100 bytes
    let fixed = parts.iter().find(|(part, _)| *part == Part::Fixed).unwrap();
    assert!((fixed.1 - 200.0 / 1500.0).abs() < 1e-12);
}

/// The least time that any division of whole groups gives that fits into the room; infinite if none does.
fn best_division(layer: &LayerLoad, nodes: &[NodeSpeed], ends: &[usize], room: &[u64]) -> f64 {
    let n_groups = ends.len() - 1;
    let bytes = |from: usize, to: usize| -> f64 {
        (ends[from]..ends[to])
            .map(|n| layer.expected_bytes(n))
            .sum()
    };
    let own = |node: usize, from: usize, to: usize| {
        let needed = (ends[to] - ends[from]) as u64 * layer.bundle_bytes;
        let time = bytes(from, to) / nodes[node].bytes_per_s;
        if needed > room[node] {
            f64::INFINITY
        } else {
            time
        }
    };
    fn search(
        (node, n_nodes): (usize, usize),
        (from, to): (usize, usize),
        own: &dyn Fn(usize, usize, usize) -> f64,
    ) -> f64 {
        if node == n_nodes {
            return if from == to { 0.0 } else { f64::INFINITY };
        }
        (from..=to)
            .map(|end| own(node, from, end).max(search((node + 1, n_nodes), (end, to), own)))
            .fold(f64::INFINITY, f64::min)
    }
    search((0, nodes.len()), (0, n_groups), &own)
}

/// The least time of all layers over every choice of hot neurons that fits.
fn best_hot_sets(layers: &[LayerLoad], machine: &MachineSpeed) -> f64 {
    let device = &machine.devices[0];
    fn search(layers: &[LayerLoad], machine: &MachineSpeed, left: u64) -> f64 {
        let [layer, others @ ..] = layers else {
            return 0.0;
        };
        let device = &machine.devices[0];
        let n = layer.frequencies.len();
        (0..1u32 << n)
            .filter_map(|set| {
                let size = u64::from(set.count_ones()) * layer.bundle_bytes;
                let left = left.checked_sub(size.next_multiple_of(device.granule_bytes))?;
                let bytes = |hot: bool| -> f64 {
                    let ids = (0..n).filter(|id| (set >> id & 1 == 1) == hot);
                    ids.map(|id| layer.expected_bytes(id)).sum()
                };
                let hot = bytes(true) / device.bytes_per_s;
                let cold = bytes(false) / machine.nodes_bytes_per_s();
                let hand_off = if set.count_ones() as usize == n {
                    0.0
                } else {
                    machine.hand_off_s
                };
                Some(hand_off + hot.max(cold) + search(others, machine, left))
            })
            .fold(f64::INFINITY, f64::min)
    }
    search(layers, machine, device.budget_bytes)
}

fn rule<'a>(ends: &'a [usize]) -> HotRule<'a> {
    HotRule {
        order: None,
        ends,
        first: false,
    }
}

#[test]
fn whole_groups_are_hot_and_layers_that_come_first_are_filled_first() {
    let layers = vec![layer(&[0.9, 0.8, 0.2, 0.1]), layer(&[0.5, 0.4, 0.3, 0.0])];
    let hot =
        |budget: u64, rules: [HotRule<'_>; 2]| hot_prefixes(&layers, &rules, budget, (100.0, 0.0));
    let pairs = rule(&[2, 4]);
    let by_room = [0, 59, 60, 119, 120, 180, 239, 240].map(|budget| hot(budget, [pairs; 2]));
    let expected = [
        [0, 0],
        [0, 0],
        [2, 0],
        [2, 0],
        [2, 2],
        [2, 4],
        [2, 4],
        [4, 4],
    ];
    assert_eq!(by_room.map(|hot| [hot[0], hot[1]]), expected);
    // the second layer first
    let first = HotRule {
        first: true,
        ..pairs
    };
    assert_eq!(hot(60, [pairs, first]), [0, 2]);
    assert_eq!(hot(120, [pairs, first]), [0, 4]);
    assert_eq!(hot(180, [pairs, first]), [2, 4]);
    // all of it or nothing, and nothing at all
    assert_eq!(hot(119, [rule(&[4]), rule(&[])]), [0, 0]);
    assert_eq!(hot(1 << 40, [rule(&[4]), rule(&[])]), [4, 0]);
    // the third and fourth neuron first: those that seldom fire are worth less than the other layer's
    let backwards = HotRule {
        order: Some(&[3, 2, 1, 0]),
        ..pairs
    };
    assert_eq!(hot(60, [backwards, pairs]), [0, 2]);
}

#[test]
fn room_that_is_left_is_filled_with_neurons_that_never_fire() {
    let mut never = layer(&[0.5, 0.0, 0.0]);
    never.scanned_bytes = 0;
    let hot = |budget| hot_prefixes(&[never.clone()], &[rule(&[1, 2, 3])], budget, (1.0, 0.0));
    assert_eq!([30, 60, 90].map(hot), [[1], [2], [3]]);
}

#[test]
fn a_layer_s_last_groups_save_its_hand_off() {
    let layers = vec![layer(&[0.9, 0.9, 0.1, 0.1]); 2];
    let hot = |hand_off_s| hot_prefixes(&layers, &[rule(&[2, 4]); 2], 120, (100.0, hand_off_s));
    assert_eq!(hot(0.001), [2, 2]);
    assert_eq!(hot(1.0), [4, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn groups_are_divided_as_well_as_can_be(
        frequencies in prop::collection::vec(0.0f32..=1.0, 8),
        speeds in prop::collection::vec(1.0f64..10.0, 1..4),
        rooms in prop::collection::vec(60u64..300, 3),
    ) {
        let layer = layer(&frequencies);
        let nodes: Vec<NodeSpeed> = speeds.into_iter().map(node).collect();
        let ends = [0, 1, 2, 4, 5, 6, 7, 8];
        let room: Vec<u64> = rooms.into_iter().take(nodes.len()).collect();
        let shares = divide_groups(&layer, &nodes, &ends, &room);
        prop_assert_eq!(shares.first().unwrap().start, 0);
        prop_assert_eq!(shares.last().unwrap().end, 7);
        prop_assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        let slowest = shares.iter().zip(&nodes).map(|(share, node)| {
            let neurons = ends[share.start]..ends[share.end];
            neurons.map(|n| layer.expected_bytes(n)).sum::<f64>() / node.bytes_per_s
        }).fold(0.0, f64::max);
        let best = best_division(&layer, &nodes, &ends, &room);
        let fits = shares.iter().zip(&room).all(|(share, room)| {
            (ends[share.end] - ends[share.start]) as u64 * layer.bundle_bytes <= *room
        });
        prop_assert_eq!(fits, best.is_finite());
        prop_assert!(!fits || slowest <= best * (1.0 + 1e-12), "{} of {}", slowest, best);
    }

    /// Against every subset of every layer's neurons, moved one by one: never over budget, and at
    /// most one neuron's worth and one hand-off worse than the best.
    #[test]
    fn hot_sets_are_as_good_as_the_best_but_for_one_neuron_and_hand_off(
        frequencies in prop::collection::vec(prop::collection::vec(0.0f32..=1.0, 5), 1..4),
        budget_neurons in 0u64..10,
        speed in prop::sample::select(vec![200.0f64, 1000.0, 100_000.0]),
        hand_off_s in prop::sample::select(vec![0.0, 0.001, 0.1, 0.5, 2.0]),
    ) {
        let layers: Vec<LayerLoad> = frequencies.iter().map(|f| layer(f)).collect();
        let machine = MachineSpeed {
            hand_off_s,
            ..machine(vec![device(speed, budget_neurons * 30, 30)], vec![node(100.0)])
        };
        let hot = hot::choose_by(&layers, &machine, 1);
        let placements: Vec<LayerPlacement> = hot.into_iter().zip(&layers).map(|(hot, layer)| LayerPlacement {
            cold: vec![ColdShare::Ids(hot.cold_ids(layer.frequencies.len()))],
            hot_ids: hot.into_ids(),
        }).collect();
        prop_assert!(hot_bytes(&layers, &placements, &machine, 0) <= budget_neurons * 30);
        let time: f64 = layers.iter().zip(&placements)
            .map(|(layer, placement)| LayerTime::of(layer, placement, &machine, &[0, 5]))
            .map(|time| time.neurons_s() + time.hand_off_s)
            .sum();
        let best = best_hot_sets(&layers, &machine);
        let one_neuron = 30.0 / 100.0;
        prop_assert!(time <= best + one_neuron + hand_off_s, "{} of {}", time, best);
        // where the device is far faster, the order by frequency alone decides, and nothing is lost
        if speed > 1e4 && hand_off_s == 0.0 {
            prop_assert!(time <= best * (1.0 + 1e-3), "{} of {}", time, best);
        }
    }

    /// Against every choice of whole groups: never over budget, and at most one group's worth and one hand-off worse than the
    /// best.
    #[test]
    fn hot_groups_are_as_good_as_the_best_but_for_one_group_and_hand_off(
        frequencies in prop::collection::vec(prop::collection::vec(0.0f32..=1.0, 6), 1..5),
        budget in 0u64..900,
        hand_off_s in prop::sample::select(vec![0.0, 0.001, 0.1, 0.5, 2.0]),
    ) {
        let layers: Vec<LayerLoad> = frequencies.iter().map(|frequencies| {
            let mut frequencies = frequencies.clone();
            frequencies.sort_by(|a, b| b.total_cmp(a));
            layer(&frequencies)
        }).collect();
        let ends = [2, 4, 6];
        let rules = vec![rule(&ends); layers.len()];
        let hot = hot_prefixes(&layers, &rules, budget, (100.0, hand_off_s));
        let bytes = |hot: &[usize]| hot.iter().sum::<usize>() as u64 * 30;
        prop_assert!(bytes(&hot) <= budget);
        prop_assert!(hot.iter().all(|n| *n == 0 || ends.contains(n)));
        let time = |hot: &[usize]| -> f64 {
            layers.iter().zip(hot).map(|(layer, &hot)| {
                let cold: f64 = (hot..6).map(|n| layer.expected_bytes(n)).sum();
                cold / 100.0 + if hot < 6 { hand_off_s } else { 0.0 }
            }).sum()
        };
        let n_choices = 4usize.pow(layers.len() as u32);
        let best = (0..n_choices).filter_map(|choice| {
            let of = |layer: usize| 2 * (choice / 4usize.pow(layer as u32) % 4);
            let hot: Vec<usize> = (0..layers.len()).map(of).collect();
            (bytes(&hot) <= budget).then(|| time(&hot))
        }).fold(f64::INFINITY, f64::min);
        let one_group = 2.0 * 30.0 / 100.0;
        prop_assert!(time(&hot) <= best + one_group + hand_off_s, "{} of {}", time(&hot), best);
    }

    #[test]
    fn budgets_hold_after_rounding_for_any_granule(
        n_layers in 1usize..5,
        n_ff in 1usize..200,
        granule in prop::sample::select(vec![1u64, 7, 256, 4096]),
        budgets in prop::collection::vec(0u64..20_000, 1..3),
        speed in 1.0f64..1e6,
    ) {
        let frequencies: Vec<f32> = (0..n_ff).map(|n| 1.0 / (1.0 + n as f32)).collect();
        let layers = vec![layer(&frequencies); n_layers];
        let devices = budgets.iter().map(|&budget| device(speed, budget, granule)).collect();
        let machine = machine(devices, vec![node(1000.0), node(2000.0)]);
        let placed = solve(&layers, &machine, &[0, n_ff]).unwrap();
        for (n, budget) in budgets.iter().enumerate() {
            prop_assert!(hot_bytes(&layers, &placed, &machine, n) <= *budget);
        }
        for placement in &placed {
            let n_cold: usize = placement.cold.iter().map(|share| share.n_neurons(&[0, n_ff])).sum();
            let n_hot: usize = placement.hot_ids.iter().map(Vec::len).sum();
            prop_assert_eq!(n_cold + n_hot, n_ff);
        }
    }
}

/// Every kernel of a device takes its time: three of a layer, two more where it has neurons and where nodes have some, three of a head.
#[test]
fn kernels_take_time_beside_their_bytes() {
    let of = |launch_s: f64| {
        let device = DeviceSpeed {
            launch_s,
            ..device(1e9, 1 << 30, 1)
        };
        let machine = MachineSpeed {
            devices: vec![device],
            nodes: vec![node(1e9)],
            hand_off_s: 0.0,
        };
        let layers = [layer(&[1.0; 4]), layer(&[1.0; 4])];
        let placement = |hot: &[u32], cold: &[u32]| LayerPlacement {
            hot_ids: vec![hot.to_vec()],
            cold: vec![ColdShare::Ids(cold.to_vec())],
        };
        // the node is as fast, so that hot neurons are what is waited for in the first layer alone
        let placements = [placement(&[0, 1, 2, 3], &[]), placement(&[], &[0, 1, 2, 3])];
        TokenTime::of(&layers, &placements, &machine, &[], 1000)
    };
    let (without, with) = (of(0.0), of(1e-3));
    assert!(
        (with.total_s() - without.total_s() - (2.0 * 3.0 + 2.0 + 2.0 + 3.0) * 1e-3).abs() < 1e-9
    );
    assert_eq!(with.layers[1].hot_s, [0.0]);
    assert_eq!(with.layers[1].neurons_s(), without.layers[1].neurons_s());
    // there is no head
    let head_s = |bytes| {
        let machine = MachineSpeed {
            devices: vec![device(1e9, 0, 1)],
            nodes: vec![node(1e9)],
            hand_off_s: 0.0,
        };
        TokenTime::of(&[], &[], &machine, &[], bytes).head_s
    };
    assert_eq!(head_s(0), 0.0);
}
