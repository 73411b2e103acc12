//! Pictures of a profile, as SVG: who does the work, and how much there is in each layer.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::PrepareError;
use crate::picture::{BAR, DrawError, Drawing, GRID, INK, draw, text};
use crate::sidecar::Profile;

const SIZE: (u32, u32) = (760, 460);
/// Points of a curve.
const N_POINTS: usize = 128;

/// Writes `power-law.svg` and `density.svg` into `folder`, and returns their names.
///
/// # Errors
/// What the file system refuses.
pub fn write_profile(folder: &Path, profile: &Profile) -> Result<[&'static str; 2], PrepareError> {
    let failed = |path: &Path, problem: String| PrepareError::Plot {
        path: path.to_owned(),
        problem,
    };
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error.to_string()))?;
    let names = ["power-law.svg", "density.svg"];
    let pictures: [Picture; 2] = [power_law, density];
    for (name, picture) in names.into_iter().zip(pictures) {
        let path = folder.join(name);
        let svg = draw(SIZE, |area| picture(area, profile))
            .map_err(|error| failed(&path, error.to_string()))?;
        std::fs::write(&path, svg).map_err(|error| failed(&path, error.to_string()))?;
    }
    Ok(names)
}

/// Draws a profile.
type Picture = fn(&Drawing<'_>, &Profile) -> Result<(), DrawError>;

/// Early layers are blue, late ones orange.
fn layer_colour(layer: usize, n_layer: usize) -> RGBColor {
    let (from, to) = ([0x09, 0x69, 0xda], [0xe3, 0x6b, 0x08]);
    let at = layer as f64 / (n_layer.max(2) - 1) as f64;
    let mix = |c: usize| {
        let (from, to): (f64, f64) = (f64::from(from[c]), f64::from(to[c]));
        (from + (to - from) * at).round() as u8
    };
    RGBColor(mix(0), mix(1), mix(2))
}

/// Share of activations against share of neurons, busiest first: a curve for each layer.
fn power_law(area: &Drawing<'_>, profile: &Profile) -> Result<(), DrawError> {
    let mut chart = ChartBuilder::on(area)
        .caption("Few neurons do most of the work", text(17))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..100.0, 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc("neurons of the layer, busiest first (%)")
        .y_desc("activations (%)")
        .label_style(text(12))
        .axis_desc_style(text(13))
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let n_layer = profile.layers.len();
    for (index, layer) in profile.layers.iter().enumerate() {
        let style = layer_colour(index, n_layer).stroke_width(1);
        let points = cumulative(&layer.descending());
        chart.draw_series(LineSeries::new(points, style))?;
    }
    // a legend of three: all layers would fill the picture
    let mut shown = vec![0, n_layer / 2, n_layer.saturating_sub(1)];
    shown.dedup();
    for (row, layer) in shown.into_iter().enumerate() {
        let y = 300 + 22 * row as i32;
        let colour = layer_colour(layer, n_layer);
        area.draw(&PathElement::new(
            vec![(560, y), (590, y)],
            colour.stroke_width(3),
        ))?;
        let style = text(13).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(format!("layer {layer}"), (600, y), style))?;
    }
    Ok(())
}

/// Percent of the neurons, and percent of the activations that they have.
fn cumulative(descending: &[u32]) -> Vec<(f64, f64)> {
    let total: f64 = descending.iter().map(|count| f64::from(*count)).sum();
    let n = descending.len().max(1);
    let step = n.div_ceil(N_POINTS);
    let mut points = vec![(0.0, 0.0)];
    let mut sum = 0.0;
    for (index, count) in descending.iter().enumerate() {
        sum += f64::from(*count);
        if (index + 1) % step == 0 || index + 1 == n {
            let share = if total > 0.0 { sum / total } else { 0.0 };
            points.push(((index + 1) as f64 * 100.0 / n as f64, share * 100.0));
        }
    }
    points
}

/// Mean share of active neurons, a bar for each layer.
fn density(area: &Drawing<'_>, profile: &Profile) -> Result<(), DrawError> {
    let densities: Vec<f64> = profile
        .layers
        .iter()
        .map(|layer| layer.density(profile.n_tokens) * 100.0)
        .collect();
    let highest = densities.iter().copied().fold(1.0, f64::max);
    let n_layer = densities.len() as f64;
    let caption = format!(
        "Active neurons of a token: {:.1} % in the mean of {} layers",
        profile.density() * 100.0,
        densities.len()
    );
    let mut chart = ChartBuilder::on(area)
        .caption(caption, text(17))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(-0.5..n_layer - 0.5, 0.0..highest * 1.08)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("layer")
        .y_desc("active neurons (%)")
        .x_label_formatter(&|layer| format!("{layer:.0}"))
        .label_style(text(12))
        .axis_desc_style(text(13))
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(densities.iter().enumerate().map(|(layer, density)| {
        let layer = layer as f64;
        Rectangle::new([(layer - 0.4, 0.0), (layer + 0.4, *density)], BAR.filled())
    }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::profile::LayerProfile;

    #[test]
    fn curves_begin_at_nothing_and_end_at_all() {
        assert_eq!(
            cumulative(&[6, 3, 1, 0]),
            [
                (0.0, 0.0),
                (25.0, 60.0),
                (50.0, 90.0),
                (75.0, 100.0),
                (100.0, 100.0)
            ]
        );
        assert_eq!(cumulative(&[0, 0]).last(), Some(&(100.0, 0.0)));
        assert!(cumulative(&vec![1; 10_000]).len() <= N_POINTS + 2);
    }

    #[test]
    fn pictures_are_written_for_any_number_of_layers() {
        let folder = tempfile::tempdir().unwrap();
        for n_layer in [1, 2, 3, 80] {
            let layer = LayerProfile {
                counts: vec![3, 2, 0, 1],
                down_norms: vec![1.0; 4],
            };
            let profile = Profile {
                n_tokens: 10,
                layers: vec![layer; n_layer],
            };
            for name in write_profile(folder.path(), &profile).unwrap() {
                let svg = std::fs::read_to_string(folder.path().join(name)).unwrap();
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
                assert!(svg.contains("(%)"), "axes have units");
            }
        }
    }
}
