//! The chain as a whole, and its parameters.

use super::*;

fn sampler(params: SamplerParams, n_vocab: usize) -> Sampler {
    Sampler::new(params, n_vocab).expect("valid parameters")
}

fn error(params: SamplerParams) -> String {
    Sampler::new(params, 100)
        .expect_err("out of range")
        .to_string()
}

fn neutral() -> SamplerParams {
    SamplerParams {
        temp: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: Some(42),
        ..SamplerParams::default()
    }
}

fn draws(sampler: &mut Sampler, logits: &[f32], n: usize) -> Vec<u32> {
    (0..n).map(|_| sampler.sample(logits)).collect()
}

#[test]
fn temperature_zero_is_greedy_whatever_the_truncation() {
    let params = SamplerParams {
        top_k: 3,
        top_p: 0.1,
        min_p: 0.9,
        ..SamplerParams::greedy()
    };
    let mut s = sampler(params, 5);
    assert_eq!(draws(&mut s, &[0.0, 2.0, 1.0, 2.0, -1.0], 3), [1, 1, 1]);
}

#[test]
fn greedy_sees_biases_and_penalties() {
    let params = SamplerParams {
        logit_bias: vec![LogitBias { id: 2, bias: 5.0 }],
        frequency_penalty: 4.0,
        ..SamplerParams::greedy()
    };
    let mut s = sampler(params, 3);
    let logits = [1.0, 0.0, 0.0];
    assert_eq!(s.sample(&logits), 2);
    s.accept(2);
    assert_eq!(s.sample(&logits), 0, "5 − 4 ties with 1: the lower id");
    s.accept(2);
    assert_eq!(s.sample(&logits), 0);
    s.reset();
    assert_eq!(s.sample(&logits), 2);
}

#[test]
fn typical_may_leave_the_likeliest_out_even_at_temperature_zero() {
    let params = SamplerParams {
        temp: 0.0,
        typical: 0.5,
        top_p: 1.0,
        min_p: 0.0,
        ..neutral()
    };
    let mut s = sampler(params, 4);
    let logits = [0.4f32.ln(), 0.2f32.ln(), 0.2f32.ln(), 0.2f32.ln()];
    assert_eq!(s.sample(&logits), 1);
}

#[test]
fn biases_come_before_penalties_and_truncation() {
    // token 3: (0 + 6) / 2 = 3 stays below 3.5; with the penalty first it would be 0 · 2 + 6 = 6
    let params = SamplerParams {
        top_k: 1,
        repeat_penalty: 2.0,
        logit_bias: vec![LogitBias { id: 3, bias: 6.0 }],
        ..neutral()
    };
    let mut s = sampler(params, 4);
    s.accept(3);
    assert_eq!(draws(&mut s, &[3.0, 3.5, 1.0, 0.0], 4), [1; 4]);
}

#[test]
fn truncation_comes_before_temperature() {
    // at temperature 1 top-p 0.6 of [0.5, 0.3, 0.2] keeps two; a temperature of 100 applied
    // first would have kept them all
    let params = SamplerParams {
        top_p: 0.6,
        temp: 100.0,
        ..neutral()
    };
    let mut s = sampler(params, 3);
    let drawn = draws(&mut s, &[0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()], 200);
    assert!(drawn.contains(&0) && drawn.contains(&1) && !drawn.contains(&2));
}

#[test]
fn a_forbidden_token_is_never_drawn() {
    let bias = vec![LogitBias {
        id: 0,
        bias: f32::NEG_INFINITY,
    }];
    let mut s = sampler(
        SamplerParams {
            logit_bias: bias,
            ..neutral()
        },
        2,
    );
    assert_eq!(draws(&mut s, &[10.0, 0.0], 50), [1; 50]);
}

#[test]
fn one_seed_one_sequence() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 * 0.05).collect();
    let mut a = sampler(
        SamplerParams {
            seed: Some(1),
            ..SamplerParams::default()
        },
        1000,
    );
    let first = draws(&mut a, &logits, 50);
    a.reset();
    assert_eq!(draws(&mut a, &logits, 50), first);
    let mut b = sampler(
        SamplerParams {
            seed: Some(2),
            ..SamplerParams::default()
        },
        1000,
    );
    assert_ne!(draws(&mut b, &logits, 50), first);
    assert_eq!(b.seed(), 2);
}

#[test]
fn a_drawn_seed_is_told_and_repeats() {
    let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
    let mut a = sampler(SamplerParams::default(), 100);
    let seed = Some(i64::from(a.seed()));
    let mut b = sampler(
        SamplerParams {
            seed,
            ..SamplerParams::default()
        },
        100,
    );
    assert_eq!(draws(&mut a, &logits, 20), draws(&mut b, &logits, 20));
}

#[test]
fn logits_that_are_not_numbers_are_not_chosen() {
    let mut s = sampler(neutral(), 3);
    assert_eq!(draws(&mut s, &[f32::NAN, 1.0, f32::NAN], 20), [1; 20]);
    let mut s = sampler(SamplerParams::default(), 3);
    assert!(s.sample(&[f32::NAN; 3]) < 3);
    assert!(s.sample(&[f32::NEG_INFINITY; 3]) < 3);
    assert_eq!(s.sample(&[0.0, f32::INFINITY, 0.0]), 1);
}

#[test]
fn values_out_of_range_name_flag_and_range() {
    let d = SamplerParams::default;
    assert_eq!(
        error(SamplerParams { top_p: 1.5, ..d() }),
        "--top-p 1.5 is out of range: give a number from 0 to 1"
    );
    for (params, flag) in [
        (SamplerParams { temp: -0.1, ..d() }, "--temp"),
        (
            SamplerParams {
                temp: f32::NAN,
                ..d()
            },
            "--temp",
        ),
        (
            SamplerParams {
                temp: f32::INFINITY,
                ..d()
            },
            "--temp",
        ),
        (SamplerParams { top_k: -2, ..d() }, "--top-k"),
        (
            SamplerParams {
                top_p: f32::NAN,
                ..d()
            },
            "--top-p",
        ),
        (SamplerParams { min_p: -0.1, ..d() }, "--min-p"),
        (
            SamplerParams {
                typical: 2.0,
                ..d()
            },
            "--typical",
        ),
        (
            SamplerParams {
                repeat_penalty: 0.0,
                ..d()
            },
            "--repeat-penalty",
        ),
        (
            SamplerParams {
                repeat_penalty: 1e-45,
                ..d()
            },
            "--repeat-penalty",
        ),
        (
            SamplerParams {
                repeat_last_n: -2,
                ..d()
            },
            "--repeat-last-n",
        ),
        (
            SamplerParams {
                presence_penalty: f32::INFINITY,
                ..d()
            },
            "--presence-penalty",
        ),
        (
            SamplerParams {
                frequency_penalty: f32::NAN,
                ..d()
            },
            "--frequency-penalty",
        ),
        (
            SamplerParams {
                seed: Some(-2),
                ..d()
            },
            "--seed",
        ),
        (
            SamplerParams {
                seed: Some(1 << 32),
                ..d()
            },
            "--seed",
        ),
    ] {
        let message = error(params);
        assert!(message.starts_with(&format!("{flag} ")), "{message}");
        assert!(message.contains("out of range: give "), "{message}");
    }
}

#[test]
fn biases_that_are_no_numbers_are_refused_however_they_come() {
    for bias in [f32::NAN, f32::INFINITY] {
        let text = error(SamplerParams {
            logit_bias: vec![LogitBias { id: 1, bias }],
            ..neutral()
        });
        assert!(text.starts_with("--logit-bias \"1"), "{text}");
        assert!(text.contains("signed number"), "{text}");
    }
}

#[test]
fn whatever_is_in_range_chooses_a_token_of_the_vocabulary() {
    let logits = [-3.0, f32::MAX, 2.0, f32::MIN, 0.0, f32::MIN_POSITIVE, 20.0];
    let extremes = [0.0, f32::MIN_POSITIVE, 1.0, f32::MAX];
    let signed = [f32::MIN, -1.0, 0.0, f32::MAX];
    let bias = |bias| vec![LogitBias { id: 2, bias }; 3];
    let mut n_drawn = 0;
    for (temp, repeat_penalty) in extremes.iter().flat_map(|a| extremes.map(|b| (*a, b))) {
        for (top, presence) in extremes.iter().flat_map(|a| signed.map(|b| (*a, b))) {
            let params = SamplerParams {
                temp,
                top_p: top.min(1.0),
                min_p: top.min(1.0),
                typical: top.min(1.0),
                repeat_penalty,
                presence_penalty: presence,
                frequency_penalty: presence,
                logit_bias: bias(presence),
                seed: Some(1),
                ..SamplerParams::default()
            };
            let Ok(mut sampler) = Sampler::new(params, logits.len()) else {
                continue;
            };
            for _ in 0..4 {
                let id = sampler.sample(&logits);
                assert!((id as usize) < logits.len(), "{:?}", sampler.params());
                sampler.accept(id);
                n_drawn += 1;
            }
        }
    }
    assert!(n_drawn > 500, "{n_drawn}");
}

#[test]
fn a_bias_outside_the_vocabulary_is_refused() {
    let logit_bias = vec![LogitBias { id: 100, bias: 1.0 }];
    assert_eq!(
        error(SamplerParams {
            logit_bias,
            ..SamplerParams::default()
        }),
        "--logit-bias names token 100, but the model has 100 tokens: give an id from 0 to 99"
    );
}

#[test]
fn biases_are_written_as_id_and_signed_number() {
    assert_eq!(
        "15043+1.5".parse(),
        Ok(LogitBias {
            id: 15043,
            bias: 1.5
        })
    );
    assert_eq!(
        "15043-1".parse(),
        Ok(LogitBias {
            id: 15043,
            bias: -1.0
        })
    );
    assert_eq!(
        "7-inf".parse(),
        Ok(LogitBias {
            id: 7,
            bias: f32::NEG_INFINITY
        })
    );
    assert_eq!(
        "7-inf".parse::<LogitBias>().expect("valid").to_string(),
        "7-inf"
    );
    for bad in [
        "",
        "7",
        "+1",
        "7+",
        "7+x",
        "-1+1",
        "7+nan",
        "7+inf",
        "99999999999+1",
    ] {
        assert!(bad.parse::<LogitBias>().is_err(), "{bad}");
    }
}

#[test]
fn parameters_come_from_json_and_from_flags() {
    let json = r#"{"temp": 0, "logit_bias": ["5-inf"], "seed": 3}"#;
    let from_json: SamplerParams = serde_json::from_str(json).expect("valid");
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        sampler: SamplerParams,
    }
    let flags = ["x", "--temp", "0", "--logit-bias", "5-inf", "--seed", "3"];
    let from_flags = <Flags as clap::Parser>::try_parse_from(flags)
        .expect("valid")
        .sampler;
    assert_eq!(from_json, from_flags);
    assert!(serde_json::from_str::<SamplerParams>(r#"{"temperature": 0}"#).is_err());
    let negative = <Flags as clap::Parser>::try_parse_from(["x", "--temp", "-1"]).expect("parses");
    assert!(negative.sampler.validate().is_err());
}

#[test]
fn a_top_k_beyond_the_vocabulary_keeps_all() {
    let all = SamplerParams {
        top_k: i32::MAX,
        ..neutral()
    };
    let logits = [0.1, 0.2, 0.3];
    let mut drawn = draws(&mut sampler(all, 3), &logits, 200);
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn, [0, 1, 2]);
}

/// There is no right answer, but an id of the vocabulary, and the same one each time.
#[test]
fn with_every_token_forbidden_an_id_comes_out_all_the_same() {
    let forbidden: Vec<LogitBias> = (0..3)
        .map(|id| LogitBias {
            id,
            bias: f32::NEG_INFINITY,
        })
        .collect();
    for params in [neutral(), SamplerParams::default(), SamplerParams::greedy()] {
        let params = SamplerParams {
            logit_bias: forbidden.clone(),
            typical: 0.5,
            seed: Some(7),
            ..params
        };
        let first = draws(&mut sampler(params.clone(), 3), &[1.0, 2.0, 3.0], 5);
        assert!(first.iter().all(|id| *id < 3), "{first:?}");
        let second = draws(&mut sampler(params, 3), &[1.0, 2.0, 3.0], 5);
        assert_eq!(first, second);
    }
}

#[test]
fn a_window_of_minus_one_is_the_whole_context() {
    let whole = SamplerParams {
        repeat_last_n: -1,
        frequency_penalty: 1.0,
        ..SamplerParams::greedy()
    };
    assert_eq!(whole.clone().in_context(300).repeat_last_n, 300);
    assert_eq!(SamplerParams::default().in_context(300).repeat_last_n, 64);
    let mut s = sampler(whole, 3);
    s.accept(0);
    for _ in 0..1000 {
        s.accept(2);
    }
    assert_eq!(s.sample(&[1.0, 0.5, -9.0]), 1, "0 is still in the window");
    s.reset();
    assert_eq!(s.sample(&[1.0, 0.5, -9.0]), 0);
}

#[test]
fn a_copied_sampler_has_room_for_all_tokens() {
    let sampler = Sampler::new(SamplerParams::default(), 5).unwrap();
    let logits = [0.0, 50.0, 0.0, 0.0, 0.0];
    assert_eq!(sampler.clone().sample(&logits), 1);
}
