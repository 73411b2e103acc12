//! What was measured as a picture: a line for each setting, a dot for each round, a bar at the median.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Measured, Verdict, median};
use crate::picture::{BAR, DrawError, Drawing, GRID, INK, draw, text};

/// Width of the picture, and of the settings' names in it.
const WIDTH: u32 = 900;
const NAMES: i32 = 360;
/// Height of a setting's line, of what is above all, and of what is below.
const LINE: i32 = 24;
const ABOVE: i32 = 50;
const BELOW: i32 = 50;
/// Marks on the axis.
const N_MARKS: u32 = 5;

/// The text of an SVG file.
///
/// # Errors
/// The plotting library's.
pub fn svg(title: &str, all: &[Measured], verdict: &Verdict) -> Result<String, DrawError> {
    let height = ABOVE + LINE * all.len() as i32 + BELOW;
    draw((WIDTH, height as u32), |area| {
        picture(area, title, all, verdict, height)
    })
}

fn picture(
    area: &Drawing<'_>,
    title: &str,
    all: &[Measured],
    verdict: &Verdict,
    height: i32,
) -> Result<(), DrawError> {
    let speeds: Vec<Vec<f64>> = all.iter().map(Measured::tokens_per_s).collect();
    let highest = speeds.iter().flatten().copied().fold(1e-9, f64::max) * 1.05;
    let x = |speed: f64| NAMES + (speed / highest * f64::from(WIDTH as i32 - NAMES - 30)) as i32;
    area.draw(&Text::new(title.to_owned(), (14, 14), text(17)))?;
    let bottom = height - BELOW;
    let at = |horizontal, vertical| Pos::new(horizontal, vertical);
    for mark in 0..=N_MARKS {
        let speed = highest * f64::from(mark) / f64::from(N_MARKS);
        let line = vec![(x(speed), ABOVE), (x(speed), bottom)];
        area.draw(&PathElement::new(line, GRID))?;
        let style = text(12).pos(at(HPos::Center, VPos::Top));
        area.draw(&Text::new(
            format!("{speed:.1}"),
            (x(speed), bottom + 6),
            style,
        ))?;
    }
    let unit = text(13).pos(at(HPos::Right, VPos::Top));
    area.draw(&Text::new(
        "tokens/s",
        (WIDTH as i32 - 30, bottom + 24),
        unit,
    ))?;
    for (index, (measured, speeds)) in all.iter().zip(&speeds).enumerate() {
        let y = ABOVE + LINE * index as i32 + LINE / 2;
        let style = text(12).pos(at(HPos::Right, VPos::Center));
        let name = measured.point.setting.to_string();
        area.draw(&Text::new(name, (NAMES - 12, y), style))?;
        let colour = match verdict.alike.contains(&index) {
            true => BAR,
            false => INK,
        };
        for &speed in speeds {
            area.draw(&Circle::new((x(speed), y), 3, colour.mix(0.5).filled()))?;
        }
        let middle = x(median(speeds.clone()));
        let bar = [(middle - 1, y - 8), (middle + 1, y + 8)];
        area.draw(&Rectangle::new(bar, colour.filled()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::measured;
    use super::*;
    use pi_topology::ColdPolicy;

    #[test]
    fn each_round_is_a_dot_and_each_setting_has_its_name() {
        let all = vec![
            measured(ColdPolicy::Shard, None, &[100.0, 101.0, 99.0]),
            measured(ColdPolicy::Interleave, Some(4), &[50.0, 51.0, 49.0]),
        ];
        let svg = svg("a model", &all, &Verdict::of(&all)).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("<circle").count(), 6);
        for words in ["a model", "tokens/s", "shard, huge pages off", "4 threads"] {
            assert!(svg.contains(words), "{words}");
        }
        // dots of the slow setting are left of those of the fast one
        let xs: Vec<f64> = svg
            .match_indices("<circle cx=\"")
            .map(|(at, start)| {
                let rest = &svg[at + start.len()..];
                rest[..rest.find('"').unwrap()].parse().unwrap()
            })
            .collect();
        assert!(xs[3..].iter().all(|slow| *slow < xs[0] - 100.0), "{xs:?}");
    }
}
