//! How pictures look: SVG, readable on the white ground, which is drawn.

use plotters::prelude::*;

pub(crate) const FONT: &str = "DejaVu Sans, Verdana, Helvetica, sans-serif";
/// Text and axes.
pub(crate) const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
/// Lines behind.
pub(crate) const GRID: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
/// Bars, and what stands out.
pub(crate) const BAR: RGBColor = RGBColor(0x09, 0x69, 0xda);

pub(crate) type Drawing<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// What a picture cannot be drawn for.
pub type DrawError = Box<dyn std::error::Error + Send + Sync>;

/// The text of a picture of so many pixels.
pub(crate) fn draw(
    size: (u32, u32),
    picture: impl FnOnce(&Drawing<'_>) -> Result<(), DrawError>,
) -> Result<String, DrawError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        picture(&area)?;
        area.present()?;
    }
    Ok(svg)
}

/// Words of so many pixels.
pub(crate) fn text(size: u32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}
